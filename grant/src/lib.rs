#![no_std]
#![doc = include_str!("../README.md")]

extern crate alloc;

mod by_mapping;
mod copy;
mod frame;
mod map;
mod parked;
mod shared;
mod span;
mod table;

pub use copy::{CopyBatch, CopyError, CopyOps, CopyRange, CopyResults, PeerSpan, copy_is_missing};
pub use frame::{BufferSize, Frame, FramePool};
pub use map::{ForeignPage, MapError, MapOps, MapRequest, Mapper, Mapping};
pub use shared::{SharedMemory, SharedPage};
pub use span::{Span, SpanMut};
pub use table::{GrantError, GrantTable, GrantedPage};
