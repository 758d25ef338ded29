//! Memory that somebody else can write at any moment.
//!
//! It is never a `&T` or a `&[u8]`: a reference promises the compiler that nobody else writes, and a compiler that
//! believes it may read twice. Here each read is one atomic load into a private value, or for long pieces an instruction that the
//! compiler does not see into.

use core::ptr::NonNull;
use core::slice;
use core::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering, fence};

use hypercall::{PAGE_SIZE, arch};

/// A page shared with a peer: 1,024 words, each read or written atomically.
///
/// An offset that is not one of a word in the page stands for another that is, so that none can reach outside: a peer's
/// number that slipped through would read the wrong word of the peer's own page, nothing else. A trait, so that the
/// ring's algorithm runs unchanged under a model checker.
pub trait SharedMemory {
    /// One 32-bit word, in the machine's byte order.
    fn load_u32(&self, offset: usize, order: Ordering) -> u32;
    /// Writes one 32-bit word.
    fn store_u32(&self, offset: usize, value: u32, order: Ordering);
    /// Adjacent words, each read once, in no order among them.
    #[inline]
    fn load_words<const N: usize>(&self, offset: usize) -> [u32; N] {
        core::array::from_fn(|index| self.load_u32(offset + index * 4, Ordering::Relaxed))
    }
    /// Writes adjacent words, each once, in no order among them.
    #[inline]
    fn store_words<const N: usize>(&self, offset: usize, words: [u32; N]) {
        for (index, word) in words.into_iter().enumerate() {
            self.store_u32(offset + index * 4, word, Ordering::Relaxed);
        }
    }
    /// `fence(SeqCst)`: what was stored before is visible before what is loaded after.
    fn fence(&self);
    /// Copies bytes out, each read once; stops at the end of the page.
    fn read_bytes(&self, offset: usize, to: &mut [u8]);
    /// Copies bytes in, each written once; stops at the end of the page.
    fn write_bytes(&self, offset: usize, from: &[u8]);
}

/// Atomic access to a page that somebody else can write. Does not own the page: its owner (a mapping, or a granted
/// page) lends it out.
///
/// Words and bytes are accessed in atomics of different sizes, which Rust's memory model does not define where they race.
/// The peer is outside that model, another domain; within ours, a ring orders its ends' accesses to a slot, and a buffer
/// has one holder at a time.
#[derive(Debug)]
pub struct SharedPage {
    base: NonNull<u8>,
}

// SAFETY: every access is atomic, so it may come from any thread.
unsafe impl Send for SharedPage {}
// SAFETY: as above.
unsafe impl Sync for SharedPage {}

impl SharedPage {
    /// The page at `base`.
    ///
    /// # Safety
    /// `base` is aligned to a page and valid for atomic reads and writes of a page for as long as the value lives (for
    /// reads alone, if nothing is ever stored through it), and no reference to the page exists meanwhile.
    #[must_use]
    pub const unsafe fn new(base: NonNull<u8>) -> Self {
        Self { base }
    }

    /// Adjacent words; where they would not all be in the page, or begin within a word, the last that are.
    #[inline]
    fn words<const N: usize>(&self, offset: usize) -> &[AtomicU32; N] {
        const { assert!(N <= PAGE_SIZE / 4) };
        // By conditions, which compilers know to be met by the offsets of slots.
        let last = PAGE_SIZE - N * 4;
        let offset = if offset <= last && offset.is_multiple_of(4) { offset } else { last };
        // SAFETY: they begin at a multiple of 4 and end within the page, which is aligned and lives as long as `self`;
        // an `AtomicU32` may be written by others at any time.
        unsafe { self.base.add(offset).cast().as_ref() }
    }

    #[inline]
    fn word(&self, offset: usize) -> &AtomicU32 {
        // SAFETY: the offset is within the page and a multiple of 4, the page is aligned and lives as long as `self`;
        // an `AtomicU32` may be written by others at any time.
        unsafe { self.base.add((offset % PAGE_SIZE) & !3).cast().as_ref() }
    }

    /// Part of the page as atomics of one size, from a multiple of it on; empty where there is no such part.
    #[inline]
    fn slice<A: Atomic<N>, const N: usize>(&self, from: usize, end: usize) -> &[A] {
        let first = from / N;
        let count = (end.min(PAGE_SIZE) / N).saturating_sub(first);
        // SAFETY: an empty slice, or one that ends within the page, which is aligned and lives as long as `self`; any
        // bytes make an atomic integer, and one may be written by others at any time.
        unsafe {
            slice::from_raw_parts(self.base.cast().add(first.min(PAGE_SIZE / N)).as_ptr(), count)
        }
    }

    /// The whole blocks that a part of the page begins with, if it begins with a long, as packets mostly do, ends in the page,
    /// and is not long enough to be copied in bulk. As many as there are in a slice of that length, so that who goes through
    /// both counts them once.
    #[inline]
    fn blocks(&self, offset: usize, len: usize) -> Option<&[Block]> {
        if len >= BULK.min(PAGE_SIZE) || !offset.is_multiple_of(8) || offset > PAGE_SIZE - len {
            return None;
        }
        // SAFETY: it begins with a long and ends within the page, which is aligned and lives as long as `self`; any bytes make an
        // atomic integer, and one may be written by others at any time.
        Some(unsafe {
            slice::from_raw_parts(self.base.add(offset).cast().as_ptr(), len / arch::BLOCK_SIZE)
        })
    }

    /// The last bytes of a part that begins with a long.
    #[inline(never)]
    fn read_last(&self, offset: usize, to: &mut [u8]) {
        let end = offset + to.len();
        let to = read::<AtomicU64, _>(self.slice(offset, end), to);
        let to = read::<AtomicU32, _>(self.slice(end & !7, end), to);
        read::<AtomicU8, _>(self.slice(end & !3, end), to);
    }

    #[inline(never)]
    fn write_last(&self, offset: usize, from: &[u8]) {
        let end = offset + from.len();
        let from = write::<AtomicU64, _>(self.slice(offset, end), from);
        let from = write::<AtomicU32, _>(self.slice(end & !7, end), from);
        write::<AtomicU8, _>(self.slice(end & !3, end), from);
    }

    /// Of any alignment and length. Kept apart, so that the usual case stays small where it is inlined.
    #[inline(never)]
    fn read_pieces(&self, offset: usize, to: &mut [u8]) {
        self.pieces(offset, to.len()).read(to);
    }

    #[inline(never)]
    fn write_pieces(&self, offset: usize, from: &[u8]) {
        self.pieces(offset, from.len()).write(from);
    }

    fn pieces(&self, offset: usize, len: usize) -> Pieces<'_> {
        let offset = offset.min(PAGE_SIZE);
        let end = offset.saturating_add(len).min(PAGE_SIZE);
        // Where whole words and longs begin and end; all at one place where there are none.
        let words = offset.next_multiple_of(4).min(end);
        let words_end = (end & !3).max(words);
        let longs = words.next_multiple_of(8).min(words_end);
        let longs_end = (words_end & !7).max(longs);
        Pieces {
            head: self.slice(offset, words),
            before: self.slice(words, longs),
            longs: self.slice(longs, longs_end),
            after: self.slice(longs_end, words_end),
            tail: self.slice(words_end, end),
        }
    }

    /// Copies up to `len` bytes from one page to another (or within one), each read once and written once; stops at the
    /// end of either page.
    pub fn copy_between(from: &Self, from_offset: usize, to: &Self, to_offset: usize, len: usize) {
        let room = |offset| PAGE_SIZE.saturating_sub(offset);
        let len = len.min(room(from_offset)).min(room(to_offset));
        if from_offset % 8 == to_offset % 8 {
            return from.pieces(from_offset, len).copy(&to.pieces(to_offset, len));
        }
        let mut buffer = [0; CHUNK];
        let mut done = 0;
        while done < len {
            // Whole longs of the source from the second round on.
            let size = (CHUNK - (from_offset + done) % 8).min(len - done);
            let part = buffer.get_mut(..size).unwrap_or_default();
            from.read_bytes(from_offset + done, part);
            to.write_bytes(to_offset + done, part);
            done += size;
        }
    }
}

/// Bytes that [`SharedPage::copy_between`] takes at a time where it has to shift them.
const CHUNK: usize = 512;

/// An atomic integer of `N` bytes.
trait Atomic<const N: usize> {
    fn get(&self) -> [u8; N];
    fn put(&self, bytes: [u8; N]);
}

macro_rules! atomic {
    ($atomic:ident, $int:ident, $size:literal) => {
        impl Atomic<$size> for $atomic {
            #[inline]
            fn get(&self) -> [u8; $size] {
                self.load(Ordering::Relaxed).to_ne_bytes()
            }
            #[inline]
            fn put(&self, bytes: [u8; $size]) {
                self.store($int::from_ne_bytes(bytes), Ordering::Relaxed);
            }
        }
    };
}

atomic!(AtomicU8, u8, 1);
atomic!(AtomicU32, u32, 4);
atomic!(AtomicU64, u64, 8);

/// Adjacent bytes of a page in as few atomics as there can be. Bytes at offsets that are equal modulo 8 fall into pieces
/// of equal lengths.
struct Pieces<'p> {
    head: &'p [AtomicU8],
    before: &'p [AtomicU32],
    longs: &'p [AtomicU64],
    after: &'p [AtomicU32],
    tail: &'p [AtomicU8],
}

impl Pieces<'_> {
    fn read(&self, to: &mut [u8]) {
        let to = read(self.head, to);
        let to = read(self.before, to);
        let to = read_longs(self.longs, to);
        let to = read(self.after, to);
        read(self.tail, to);
    }

    fn write(&self, from: &[u8]) {
        let from = write(self.head, from);
        let from = write(self.before, from);
        let from = write_longs(self.longs, from);
        let from = write(self.after, from);
        write(self.tail, from);
    }

    fn copy(&self, to: &Self) {
        copy(self.head, to.head);
        copy(self.before, to.before);
        copy_longs(self.longs, to.longs);
        copy(self.after, to.after);
        copy(self.tail, to.tail);
    }
}

/// Longs that are read or written in one go: compilers do not unroll loops over atomics.
const BLOCK: usize = arch::BLOCK_SIZE / 8;

type Block = [AtomicU64; BLOCK];

/// Bytes from which on the processor is told to copy them, in one instruction or a few; what watches each access has to see
/// them all.
const BULK: usize =
    if cfg!(any(loom, miri)) { usize::MAX } else { arch::BULK_BLOCKS * arch::BLOCK_SIZE };

/// Whether blocks between a page and a place of ours go in bulk.
fn is_bulk(count: usize, ours: &[[u8; arch::BLOCK_SIZE]]) -> bool {
    count * arch::BLOCK_SIZE >= BULK && ours.as_ptr().addr().is_multiple_of(arch::BULK_ALIGN)
}

#[inline]
fn read_blocks(from: &[Block], to: &mut [[u8; arch::BLOCK_SIZE]]) {
    for (to, from) in to.iter_mut().zip(from) {
        for (to, from) in to.as_chunks_mut().0.iter_mut().zip(from) {
            *to = from.get();
        }
    }
}

#[inline]
fn write_blocks(to: &[Block], from: &[[u8; arch::BLOCK_SIZE]]) {
    for (from, to) in from.iter().zip(to) {
        for (from, to) in from.as_chunks().0.iter().zip(to) {
            to.put(*from);
        }
    }
}

/// As [`read`], in bulk if there are enough of them.
fn read_longs<'b>(from: &[AtomicU64], to: &'b mut [u8]) -> &'b mut [u8] {
    let (blocks, last) = from.as_chunks();
    let (to, rest) = to.split_at_mut((blocks.len() * arch::BLOCK_SIZE).min(to.len()));
    let to = to.as_chunks_mut().0;
    let count = blocks.len().min(to.len());
    if is_bulk(count, to) {
        // SAFETY: there are as many blocks at either place, of which these are of atomics, that others may write, and `to` is
        // ours alone, and was found to be aligned. Nobody looks there before all is copied: what arrives is one value for
        // each byte, whatever others write meanwhile.
        unsafe { arch::copy_blocks(blocks.as_ptr().cast(), to.as_mut_ptr().cast(), count) };
    } else {
        read_blocks(blocks, to);
    }
    read(last, rest)
}

/// As [`write`], likewise.
fn write_longs<'b>(to: &[AtomicU64], from: &'b [u8]) -> &'b [u8] {
    let (blocks, last) = to.as_chunks();
    let (from, rest) = from.split_at((blocks.len() * arch::BLOCK_SIZE).min(from.len()));
    let from = from.as_chunks().0;
    let count = blocks.len().min(from.len());
    if is_bulk(count, from) {
        // SAFETY: there are as many blocks at either place, of which these are of atomics, that may be written behind a shared
        // reference, and `from` is borrowed, so that nobody writes there, and was found to be aligned.
        unsafe {
            arch::copy_blocks(from.as_ptr().cast(), blocks.as_ptr().cast_mut().cast(), count);
        }
    } else {
        write_blocks(blocks, from);
    }
    write(last, rest)
}

/// As [`copy`], likewise.
fn copy_longs(from: &[AtomicU64], to: &[AtomicU64]) {
    let ((blocks, last), (to_blocks, to_last)) =
        (from.as_chunks::<BLOCK>(), to.as_chunks::<BLOCK>());
    let count = blocks.len().min(to_blocks.len());
    if count * arch::BLOCK_SIZE >= BULK {
        // SAFETY: there are as many blocks at either place, of longs that are aligned as such, and of atomics, that may be
        // written behind a shared reference and by others.
        unsafe {
            arch::copy_blocks(blocks.as_ptr().cast(), to_blocks.as_ptr().cast_mut().cast(), count);
        }
        return copy(last, to_last);
    }
    copy(from, to);
}

/// Fills the first bytes of `to`; answers the rest of it.
#[inline]
fn read<'b, A: Atomic<N>, const N: usize>(from: &[A], to: &'b mut [u8]) -> &'b mut [u8] {
    let (to, rest) = to.split_at_mut((from.len() * N).min(to.len()));
    for (to, from) in to.as_chunks_mut().0.iter_mut().zip(from) {
        *to = from.get();
    }
    rest
}

/// Takes the first bytes of `from`; answers the rest of it.
#[inline]
fn write<'b, A: Atomic<N>, const N: usize>(to: &[A], from: &'b [u8]) -> &'b [u8] {
    let (from, rest) = from.split_at((to.len() * N).min(from.len()));
    for (to, from) in to.iter().zip(from.as_chunks().0) {
        to.put(*from);
    }
    rest
}

fn copy<A: Atomic<N>, const N: usize>(from: &[A], to: &[A]) {
    for (to, from) in to.iter().zip(from) {
        to.put(from.get());
    }
}

impl SharedMemory for SharedPage {
    #[inline]
    fn load_u32(&self, offset: usize, order: Ordering) -> u32 {
        self.word(offset).load(order)
    }

    #[inline]
    fn store_u32(&self, offset: usize, value: u32, order: Ordering) {
        self.word(offset).store(value, order);
    }

    #[inline]
    fn load_words<const N: usize>(&self, offset: usize) -> [u32; N] {
        self.words(offset).each_ref().map(|word| word.load(Ordering::Relaxed))
    }

    #[inline]
    fn store_words<const N: usize>(&self, offset: usize, words: [u32; N]) {
        for (place, word) in self.words::<N>(offset).iter().zip(words) {
            place.store(word, Ordering::Relaxed);
        }
    }

    #[inline]
    fn fence(&self) {
        fence(Ordering::SeqCst);
    }

    #[inline]
    fn read_bytes(&self, offset: usize, to: &mut [u8]) {
        let Some(from) = self.blocks(offset, to.len()) else {
            return self.read_pieces(offset, to);
        };
        let (blocks, last) = to.as_chunks_mut();
        read_blocks(from, blocks);
        if !last.is_empty() {
            self.read_last(offset + blocks.len() * arch::BLOCK_SIZE, last);
        }
    }

    #[inline]
    fn write_bytes(&self, offset: usize, from: &[u8]) {
        let Some(to) = self.blocks(offset, from.len()) else {
            return self.write_pieces(offset, from);
        };
        let (blocks, last) = from.as_chunks();
        write_blocks(to, blocks);
        if !last.is_empty() {
            self.write_last(offset + blocks.len() * arch::BLOCK_SIZE, last);
        }
    }
}

impl<M: SharedMemory + ?Sized> SharedMemory for &M {
    fn load_u32(&self, offset: usize, order: Ordering) -> u32 {
        (**self).load_u32(offset, order)
    }
    fn store_u32(&self, offset: usize, value: u32, order: Ordering) {
        (**self).store_u32(offset, value, order);
    }
    fn load_words<const N: usize>(&self, offset: usize) -> [u32; N] {
        (**self).load_words(offset)
    }
    fn store_words<const N: usize>(&self, offset: usize, words: [u32; N]) {
        (**self).store_words(offset, words);
    }
    fn fence(&self) {
        (**self).fence();
    }
    fn read_bytes(&self, offset: usize, to: &mut [u8]) {
        (**self).read_bytes(offset, to);
    }
    fn write_bytes(&self, offset: usize, from: &[u8]) {
        (**self).write_bytes(offset, from);
    }
}
