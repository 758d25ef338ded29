//! The UART that Xen emulates for a guest (`vpl011`): of a PL011, what an SBSA UART has. Xen prints what is written to it as
//! `DOMn: ` and the line.

use core::arch::asm;
use core::ptr::{NonNull, with_exposed_provenance_mut};
use core::sync::atomic::{AtomicPtr, Ordering};

/// Offset of the data register; a write sends a byte.
const DATA: usize = 0x00;
/// Offset of the flag register.
const FLAGS: usize = 0x18;
/// No byte can be sent now.
const FLAG_FULL: u32 = 1 << 5;
/// How often to look for room before a byte is dropped: a reader that is gone must not hold up the domain.
const PATIENCE: usize = 10_000;

static REGISTERS: AtomicPtr<u8> = AtomicPtr::new(core::ptr::null_mut());

/// Names the UART to write to.
///
/// # Safety
/// An SBSA UART's registers are at the address, mapped there as device memory for good.
pub unsafe fn init(address: u64) {
    REGISTERS.store(with_exposed_provenance_mut(address as usize), Ordering::Relaxed);
}

/// Writes to the UART. `None` if this domain has none.
pub fn write(text: &[u8]) -> Option<()> {
    let registers = NonNull::new(REGISTERS.load(Ordering::Relaxed))?;
    for byte in text {
        if (0..PATIENCE).any(|_| read(registers, FLAGS) & FLAG_FULL == 0) {
            send(registers, *byte);
        }
    }
    Some(())
}

/// One plain load: Xen emulates no others, and a volatile read may become one with write-back of the address.
fn read(registers: NonNull<u8>, offset: usize) -> u32 {
    let value: u32;
    // SAFETY: by `init`, a register is there, and reading FLAGS has no effect.
    unsafe {
        asm!("ldr {value:w}, [{at}]", value = out(reg) value, at = in(reg) registers.add(offset).as_ptr(), options(nostack, preserves_flags));
    }
    value
}

fn send(registers: NonNull<u8>, byte: u8) {
    // SAFETY: by `init`, the data register is there; a byte written to it touches no memory.
    unsafe {
        asm!("str {value:w}, [{at}]", value = in(reg) u32::from(byte), at = in(reg) registers.add(DATA).as_ptr(), options(nostack, preserves_flags));
    }
}
