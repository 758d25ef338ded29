//! Segments, interrupt vectors, and faults, none of which is expected: say what happened, and end the domain.

use core::arch::global_asm;
use core::fmt::Write;
use core::sync::atomic::{AtomicBool, Ordering};

use hypercall::Shutdown;
use spin::Once;
use x86_64::VirtAddr;
use x86_64::instructions::segmentation::{CS, Segment};
use x86_64::instructions::tables::{lidt, load_tss};
use x86_64::registers::control::Cr2;
use x86_64::structures::DescriptorTablePointer;
use x86_64::structures::gdt::{Descriptor, GlobalDescriptorTable};
use x86_64::structures::idt::Entry;
use x86_64::structures::tss::TaskStateSegment;

use super::{__fault_stack_top, __guard, __image_start, __stack_bottom, place};
use crate::console::Line;
use crate::machine::HV;

/// The vector by which Xen says that an event channel is pending.
pub const UPCALL_VECTOR: u8 = 0x40;

global_asm!(
    r#"
    .macro vector number
    .balign 16
    // The processor pushes an error code for these, and nothing for the others.
    .if (\number != 8) && (\number != 10) && (\number != 11) && (\number != 12) && (\number != 13) && (\number != 14) && (\number != 17) && (\number != 21) && (\number != 29) && (\number != 30)
    push    0
    .endif
    push    \number
    jmp     save_and_report
    .endm

    .text
    .balign 16
    .global {vectors}
{vectors}:
    .set    number, 0
    .rept   256
    vector  number
    .set    number, number + 1
    .endr

save_and_report:
    push    r15
    push    r14
    push    r13
    push    r12
    push    r11
    push    r10
    push    r9
    push    r8
    push    rbp
    push    rdi
    push    rsi
    push    rdx
    push    rcx
    push    rbx
    push    rax
    cld
    mov     rdi, rsp
    and     rsp, -16
    call    {report}
    ud2

    // The wait, the only place where interrupts are open.
    .global {halt}
{halt}:
    sti
halt_here:
    hlt
    cli
    ret

    // An interrupt has done its work when it ends the wait, be it before it has begun: `STI` holds interrupts back until
    // `HLT` runs, but not every hypervisor keeps that up when it interrupts the two for its own ends. Interrupts stay
    // masked in what it returns to: Xen would raise it again until the pending flag is cleared, which is the program's to
    // do.
    .balign 16
    .global {upcall}
{upcall}:
    cmp     qword ptr [rsp], offset halt_here
    jne     1f
    inc     qword ptr [rsp]         // HLT is one byte
1:  and     dword ptr [rsp + 16], 0xfffffdff
    iretq
"#,
    vectors = sym vectors,
    report = sym report,
    halt = sym halt,
    upcall = sym upcall,
);

unsafe extern "C" {
    /// What the vectors of the table jump to: 16 bytes for each.
    safe fn vectors();
    /// The one that is expected.
    safe fn upcall();
    /// Waits for it.
    pub safe fn halt();
}

/// Bytes of code for each vector.
const STRIDE: u64 = 16;

/// The interrupt descriptor table as the processor reads it. An entry's type is what its handler is called with: nothing
/// that Rust has a convention for.
#[repr(C, align(16))]
struct Vectors([Entry<()>; 256]);

static TASK: Once<TaskStateSegment> = Once::new();
static SEGMENTS: Once<GlobalDescriptorTable> = Once::new();
static VECTORS: Once<Vectors> = Once::new();

/// From here on a fault is reported, on a stack of its own: one that is full can still be reported.
///
/// # Safety
/// Called once.
pub unsafe fn init() {
    let task = TASK.call_once(|| {
        let mut task = TaskStateSegment::new();
        // They are all for faults, none of which is handled inside another.
        task.interrupt_stack_table = [VirtAddr::new_truncate(place(&__fault_stack_top)); 7];
        task
    });
    let mut selectors = None;
    let segments = SEGMENTS.call_once(|| {
        let mut segments = GlobalDescriptorTable::new();
        selectors = Some((
            segments.append(Descriptor::kernel_code_segment()),
            segments.append(Descriptor::tss_segment(task)),
        ));
        segments
    });
    let Some((code, task)) = selectors else { return };
    segments.load();
    // SAFETY: the selectors are of the table that has just been loaded, which stays for good: code with the rights that we
    // have, and the task that was made above.
    unsafe {
        CS::set_reg(code);
        load_tss(task);
    }
    let table = VECTORS.call_once(|| {
        let mut table = Vectors([const { Entry::missing() }; 256]);
        for (number, entry) in (0..).zip(&mut table.0) {
            let at = (vectors as *const ()).expose_provenance() as u64 + number * STRIDE;
            // SAFETY: code for this vector is there, which never returns, on the stack that the task names first.
            unsafe { entry.set_handler_addr(VirtAddr::new_truncate(at)).set_stack_index(0) };
        }
        if let Some(entry) = table.0.get_mut(usize::from(UPCALL_VECTOR)) {
            *entry = Entry::missing();
            let at = (upcall as *const ()).expose_provenance() as u64;
            // SAFETY: the code there returns with all registers as they were; code for bare metal has no red zone, so
            // that it may use the stack of what it interrupts.
            unsafe { entry.set_handler_addr(VirtAddr::new_truncate(at)) };
        }
        table
    });
    let pointer = DescriptorTablePointer {
        limit: (size_of::<Vectors>() - 1) as u16,
        base: VirtAddr::from_ptr(table),
    };
    // SAFETY: the table stays for good, and all its entries are filled in.
    unsafe { lidt(&pointer) };
}

/// What is on the stack when [`report`] is called: what the assembly pushed, then the processor.
#[repr(C)]
struct Frame {
    registers: [u64; 15],
    vector: u64,
    error: u64,
    rip: u64,
    cs: u64,
    rflags: u64,
    rsp: u64,
    ss: u64,
}

const NAMES: [&str; 15] = [
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "r8", "r9", "r10", "r11", "r12", "r13", "r14",
    "r15",
];

const PAGE_FAULT: u64 = 14;

fn cause(vector: u64) -> &'static str {
    match vector {
        0 => "division by zero",
        1 => "debug exception",
        2 => "non-maskable interrupt",
        3 => "breakpoint instruction",
        6 => "invalid instruction",
        8 => "double fault",
        10 => "invalid task",
        11 => "segment not present",
        12 => "stack segment fault",
        13 => "general protection fault",
        PAGE_FAULT => "page fault",
        16 | 19 => "floating-point fault",
        17 => "misaligned access",
        18 => "machine check",
        32.. => "interrupt",
        _ => "exception",
    }
}

extern "C" fn report(frame: &Frame) -> ! {
    static REPORTED: AtomicBool = AtomicBool::new(false);
    // A fault while reporting one: enough has been said.
    if REPORTED.swap(true, Ordering::Relaxed) {
        HV.shutdown(Shutdown::Crash);
    }
    let address = Cr2::read_raw();
    let mut line = Line::last();
    // Writing to a `Line` never fails.
    let _ = write!(
        line,
        "[FAULT] {} at image+{:#x}",
        cause(frame.vector),
        frame.rip.wrapping_sub(place(&__image_start)),
    );
    if frame.vector == PAGE_FAULT {
        let how = match (frame.error & 2 != 0, frame.error & 16 != 0) {
            (_, true) => "executing",
            (true, _) => "writing",
            _ => "reading",
        };
        let _ = write!(line, ", {how} address {address:#x}");
    }
    let _ = writeln!(
        line,
        "\n  error {:#x} rip {:#x} rflags {:#x} rsp {:#x} cs {:#x} ss {:#x} vector {}",
        frame.error, frame.rip, frame.rflags, frame.rsp, frame.cs, frame.ss, frame.vector,
    );
    if frame.vector == PAGE_FAULT && (place(&__guard)..place(&__stack_bottom)).contains(&address) {
        let _ = writeln!(line, "  the stack is full");
    }
    for (names, registers) in NAMES.chunks(4).zip(frame.registers.chunks(4)) {
        for (name, register) in names.iter().zip(registers) {
            let _ = write!(line, "  {name:<3} {register:016x}");
        }
        let _ = writeln!(line);
    }
    drop(line);
    HV.shutdown(Shutdown::Crash)
}
