//! From Xen's jump to [`start`](super::start): as a PVH guest, in 32-bit protected mode, start info in ebx
//! (Xen, docs/misc/pvh.pandoc).

use core::arch::global_asm;

global_asm!(
    r#"
    // XEN_ELFNOTE_PHYS32_ENTRY (elfnote.h): where a PVH guest begins.
    .section .note.Xen, "a", @note
    .balign 4
    .long   4                       // bytes of name,
    .long   4                       // and of value
    .long   18
    .asciz  "Xen"
    .long   _start

    // Four gigabytes at their own addresses, until the final tables are made.
    .section .bss.early, "aw", @nobits
    .balign 4096
early_root:
    .skip   4096
early_directories:
    .skip   4096
early_pages:
    .skip   4 * 4096

    .section .rodata.early, "a"
    .balign 8
early_segments:
    .quad   0
    .quad   0x00af9b000000ffff      // 64-bit code
early_segments_end:
early_segments_pointer:
    .word   early_segments_end - early_segments - 1
    .long   early_segments

    .section .head, "ax"
    .code32
    .global _start
_start:
    cli
    cld
    mov     esi, ebx

    mov     edi, offset early_pages
    mov     eax, 0x83               // large, writable, present
    mov     ecx, 4 * 512
1:  mov     dword ptr [edi], eax
    mov     dword ptr [edi + 4], 0
    add     eax, 0x200000
    add     edi, 8
    dec     ecx
    jnz     1b

    mov     edi, offset early_directories
    mov     eax, offset early_pages
    or      eax, 3
    mov     ecx, 4
2:  mov     dword ptr [edi], eax
    mov     dword ptr [edi + 4], 0
    add     eax, 4096
    add     edi, 8
    dec     ecx
    jnz     2b

    mov     edi, offset early_root
    mov     eax, offset early_directories
    or      eax, 3
    mov     dword ptr [edi], eax
    mov     dword ptr [edi + 4], 0
    mov     cr3, edi

    mov     eax, cr4
    or      eax, 1 << 5             // PAE
    mov     cr4, eax
    mov     ecx, 0xc0000080         // EFER:
    rdmsr
    or      eax, (1 << 8) | (1 << 11) // long mode, no-execute
    wrmsr
    mov     eax, cr0
    or      eax, (1 << 31) | (1 << 16) // paging, and read-only means us too
    mov     cr0, eax

    lgdt    [early_segments_pointer]
    mov     esp, offset __stack_top
    push    8
    mov     eax, offset early_done
    push    eax
    retf

    .code64
early_done:
    xor     eax, eax
    mov     ss, eax
    mov     ds, eax
    mov     es, eax
    mov     fs, eax
    mov     gs, eax
    mov     rsp, offset __stack_top
    xor     ebp, ebp
    mov     edi, esi
    call    {start}
    ud2
    .text
"#,
    start = sym super::start,
);
