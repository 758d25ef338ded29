//! From Xen's jump to [`start`](super::start): as a Linux arm64 Image, at EL1, MMU off, device tree in x0.

use core::arch::global_asm;

global_asm!(
    r#"
    .section .head, "ax"
    .global _start
_start:
    // The header of a Linux arm64 Image (Linux, Documentation/arm64/booting.rst).
    b       1f
    .word   0
    .quad   0                       // offset from a 2 MiB boundary
    .quad   __image_size            // with .bss and stack, which the file does not have
    .quad   0xa                     // little-endian, 4 KiB pages, anywhere in memory
    .quad   0, 0, 0
    .ascii  "ARM\x64"
    .word   0

1:  msr     daifset, #0xf           // for good: interrupts are polled
    mov     x19, x0
    mrs     x0, CurrentEL
    cmp     x0, #(1 << 2)
    b.ne    9f
    mov     x0, #(3 << 20)          // CPACR_EL1.FPEN: compiled code uses vector registers
    msr     cpacr_el1, x0
    adrp    x0, {vectors}
    add     x0, x0, :lo12:{vectors}
    msr     vbar_el1, x0
    isb

    // Relocate. Linked at 0, the image's address is what is to be added.
    adrp    x20, __image_start
    adrp    x1, __rela_start
    add     x1, x1, :lo12:__rela_start
    adrp    x2, __rela_end
    add     x2, x2, :lo12:__rela_end
2:  cmp     x1, x2
    b.hs    3f
    ldp     x3, x4, [x1], #16       // offset, kind
    ldr     x5, [x1], #8            // addend
    cmp     x4, #1027               // R_AARCH64_RELATIVE is all a static executable has
    b.ne    9f
    add     x5, x5, x20
    str     x5, [x20, x3]
    b       2b

3:  adrp    x1, __bss_start
    add     x1, x1, :lo12:__bss_start
    adrp    x2, __bss_end
4:  stp     xzr, xzr, [x1], #16
    cmp     x1, x2
    b.lo    4b

    // Compiled code reads and writes numbers wherever they lie, which only normal memory allows, and without translation none
    // is. So that and nothing else is what the first tables say of the 512 GiB around the image and around the device tree: all
    // is at its own address, and nothing is cached yet.
    adrp    x1, {tables}            // three: the root, one for the image, one for the tree
    add     x1, x1, :lo12:{tables}
    mov     x5, #0xf01              // a block of normal memory, shareable, accessed, of one address space (nG)
    add     x2, x1, #0x1000
    mov     x3, x20
    bl      5f
    lsr     x6, x20, #39
    eor     x6, x6, x19, lsr #39
    cbz     x6, 7f
    add     x2, x1, #0x2000
    mov     x3, x19
    bl      5f
    b       7f

    // Fills table x2 with what is around x3, and enters it in the root.
5:  lsr     x3, x3, #39
    orr     x4, x2, #3              // a table
    str     x4, [x1, x3, lsl #3]
    orr     x4, x5, x3, lsl #39
    mov     x6, #512
    mov     x7, #(1 << 30)
6:  str     x4, [x2], #8
    add     x4, x4, x7
    subs    x6, x6, #1
    b.ne    6b
    ret

7:  mov     x0, #0xff               // memory of kind 0: write-back, as it will be
    msr     mair_el1, x0
    mov     x0, x1
    movk    x0, #1, lsl #48         // not the address space of the tables that will follow
    msr     ttbr0_el1, x0
    mrs     x0, id_aa64mmfr0_el1
    and     x0, x0, #0xf
    mov     x2, #5
    cmp     x0, x2
    csel    x0, x0, x2, lo
    ldr     x2, ={tcr}
    orr     x0, x2, x0, lsl #32
    msr     tcr_el1, x0
    dsb     sy
    tlbi    vmalle1
    dsb     sy
    isb
    mrs     x0, sctlr_el1
    orr     x0, x0, #1              // translation
    bic     x0, x0, #2              // and no alignment
    msr     sctlr_el1, x0
    isb

    // Exceptions run on a stack of their own (SP_EL1), all else on SP_EL0: an overflow can still be reported.
    adrp    x1, __exception_stack_top
    mov     sp, x1
    adrp    x1, __stack_top
    msr     spsel, #0
    mov     sp, x1
    mov     x0, x19
    mov     x29, xzr
    mov     x30, xzr
    b       {start}

    // Nothing works yet: SCHEDOP_shutdown with SHUTDOWN_crash says at least that.
9:  adr     x1, 10f
    mov     x0, #2
    mov     x16, #29
    hvc     #0xea1
    b       9b
    .balign 4
10: .word   3
    .text
"#,
    vectors = sym super::exceptions::vectors,
    start = sym super::start,
    tables = sym super::mmu::FIRST,
    tcr = const super::mmu::TRANSLATION,
);
