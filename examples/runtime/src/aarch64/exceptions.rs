//! Exceptions, of which one is expected, when it is looked [whether anything is at an address](is_readable). Of any other it is said
//! what happened, and the domain ends.

use core::arch::global_asm;
use core::fmt::Write;
use core::sync::atomic::{AtomicBool, Ordering};

use aarch64_cpu::registers::{ELR_EL1, ESR_EL1, FAR_EL1, Readable, SP_EL0, SPSR_EL1};
use hypercall::Shutdown;

use super::{__guard, __image_start, __stack_bottom, place};
use crate::console::Line;
use crate::machine::HV;

global_asm!(
    r#"
    .macro vector number
    .balign 128
    sub     sp, sp, #256
    stp     x0, x1, [sp]
    mov     x1, #\number
    b       save_and_report
    .endm

    .text
    .balign 2048
    .global {vectors}
{vectors}:
    .irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
    vector \n
    .endr

save_and_report:
    stp     x2, x3, [sp, #16]
    cmp     x1, #4                  // synchronous, from where we are
    b.ne    1f
    mrs     x0, elr_el1
    adr     x2, 3f
    cmp     x0, x2
    b.ne    1f
    mrs     x0, esr_el1
    lsr     x0, x0, #26
    cmp     x0, #0x25               // a data abort
    b.ne    1f
    adr     x2, 4f
    msr     elr_el1, x2
    ldp     x2, x3, [sp, #16]
    ldp     x0, x1, [sp]
    add     sp, sp, #256
    eret
1:
    stp     x4, x5, [sp, #32]
    stp     x6, x7, [sp, #48]
    stp     x8, x9, [sp, #64]
    stp     x10, x11, [sp, #80]
    stp     x12, x13, [sp, #96]
    stp     x14, x15, [sp, #112]
    stp     x16, x17, [sp, #128]
    stp     x18, x19, [sp, #144]
    stp     x20, x21, [sp, #160]
    stp     x22, x23, [sp, #176]
    stp     x24, x25, [sp, #192]
    stp     x26, x27, [sp, #208]
    stp     x28, x29, [sp, #224]
    str     x30, [sp, #240]
    mov     x0, sp
    b       {report}

    .global {is_readable}
{is_readable}:
3:  ldrb    w1, [x0]
    mov     w0, #1
    ret
4:  mov     w0, wzr
    ret
"#,
    vectors = sym vectors,
    is_readable = sym is_readable,
    report = sym report,
);

unsafe extern "C" {
    /// The vector table.
    pub safe fn vectors();

    /// Whether a byte can be read here: 1 if it can, else 0.
    ///
    /// # Safety
    /// The translation tables are on, and reading there, if anything is there, does nothing.
    pub unsafe fn is_readable(address: u64) -> u32;
}

fn cause(vector: u64, class: u64) -> &'static str {
    match (vector % 4, class) {
        (1, _) => "interrupt",
        (2, _) => "fast interrupt",
        (3, _) => "system error",
        (_, 0x21) => "instruction abort",
        (_, 0x22) => "misaligned program counter",
        (_, 0x25) => "data abort",
        (_, 0x26) => "misaligned stack pointer",
        (_, 0x3c) => "breakpoint instruction",
        (_, 0) => "unknown instruction",
        _ => "exception",
    }
}

extern "C" fn report(registers: &[u64; 31], vector: u64) -> ! {
    static REPORTED: AtomicBool = AtomicBool::new(false);
    // An exception while reporting one: enough has been said. A load and a store, not a swap: exclusive accesses
    // need the MMU, which may not be on.
    if REPORTED.load(Ordering::Relaxed) {
        HV.shutdown(Shutdown::Crash);
    }
    REPORTED.store(true, Ordering::Relaxed);

    let (esr, elr, far) = (ESR_EL1.get(), ELR_EL1.get(), FAR_EL1.get());
    let base = place(&__image_start);
    let mut line = Line::last();
    // Writing to a `Line` never fails.
    let _ = writeln!(
        line,
        "[FAULT] {} at image+{:#x}, address {far:#x}\n  esr {esr:#x} elr {elr:#x} spsr {:#x} sp {:#x} vector {vector}",
        cause(vector, esr >> 26),
        elr.wrapping_sub(base),
        SPSR_EL1.get(),
        SP_EL0.get(),
    );
    if (place(&__guard)..place(&__stack_bottom)).contains(&far) {
        let _ = writeln!(line, "  the stack is full");
    }
    for (row, registers) in registers.chunks(4).enumerate() {
        for (column, register) in registers.iter().enumerate() {
            let _ = write!(line, "  x{:<2} {register:016x}", row * 4 + column);
        }
        let _ = writeln!(line);
    }
    drop(line);
    HV.shutdown(Shutdown::Crash)
}
