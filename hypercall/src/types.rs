//! Newtypes for the numbers that cross Xen's ABI: a port is never mistaken for a reference.

use core::fmt;

/// Bytes in a page. Xen's grants, rings and frames are all in 4 KiB units, whatever the kernel's own page size.
pub const PAGE_SIZE: usize = 4096;
/// log2 of [`PAGE_SIZE`].
pub const PAGE_SHIFT: u32 = 12;

macro_rules! number {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        #[repr(transparent)]
        pub struct $name(pub $inner);

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

number! {
    /// A domain (`domid_t`, xen.h).
    DomId(u16)
}
number! {
    /// A reference into the granting domain's table (`grant_ref_t`, grant_table.h).
    GrantRef(u32)
}
number! {
    /// What Xen calls a mapping of someone's grant (`grant_handle_t`, grant_table.h).
    MapHandle(u32)
}
number! {
    /// A local event channel (`evtchn_port_t`, event_channel.h). Port 0 is never valid.
    Port(u32)
}
number! {
    /// A guest frame number: a guest-physical address divided by [`PAGE_SIZE`].
    Gfn(u64)
}
number! {
    /// An address as a device on the bus sees it, in bytes.
    BusAddr(u64)
}
number! {
    /// The number of a network interface within its domain (the `N` of `device/vif/N`, io/netif.h).
    Handle(u32)
}
number! {
    /// A virtual CPU of the calling domain.
    VcpuId(u32)
}
number! {
    /// A virtual interrupt line (`VIRQ_*`, xen.h).
    Virq(u32)
}

impl DomId {
    /// The caller itself (`DOMID_SELF`, xen.h).
    pub const SELF: Self = Self(0x7ff0);
    /// The first id that no domain can have (`DOMID_FIRST_RESERVED`, xen.h).
    pub const FIRST_RESERVED: Self = Self(0x7ff0);
}

impl Virq {
    /// The alarm of a virtual CPU's clock (`VIRQ_TIMER`).
    pub const TIMER: Self = Self(0);
    /// Something was typed at Xen's console; for dom0 (`VIRQ_CONSOLE`).
    pub const CONSOLE: Self = Self(2);
    /// Some domain shut down, crashed or died; for the domain that plays toolstack (`VIRQ_DOM_EXC`).
    pub const DOM_EXC: Self = Self(3);
}

impl MapHandle {
    /// What Xen never hands out (`INVALID_GRANT_HANDLE`): the value before a map has succeeded.
    pub const INVALID: Self = Self(u32::MAX);
}

impl Gfn {
    /// No frame at all (`INVALID_GFN`): what an unset HVM_PARAM_STORE_PFN reads as.
    pub const INVALID: Self = Self(u64::MAX);

    /// The guest-physical address of the frame's first byte.
    #[must_use]
    pub const fn address(self) -> u64 {
        self.0 << PAGE_SHIFT
    }

    /// The frame that holds a guest-physical address.
    #[must_use]
    pub const fn of_address(address: u64) -> Self {
        Self(address >> PAGE_SHIFT)
    }
}

/// A byte position within a page, 0 to 4,095.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
#[repr(transparent)]
pub struct PageOffset(u16);

impl PageOffset {
    /// The start of the page.
    pub const ZERO: Self = Self(0);

    /// `None` from [`PAGE_SIZE`] on.
    #[must_use]
    pub const fn new(offset: u16) -> Option<Self> {
        if (offset as usize) < PAGE_SIZE { Some(Self(offset)) } else { None }
    }

    /// The position in bytes.
    #[must_use]
    pub const fn get(self) -> u16 {
        self.0
    }

    /// How many bytes the page has from here on: 1 to 4,096.
    #[must_use]
    pub const fn room(self) -> usize {
        PAGE_SIZE - self.0 as usize
    }
}

/// Nanoseconds on the embedder's monotonic clock; its zero is the embedder's.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
#[repr(transparent)]
pub struct Instant(pub u64);

impl Instant {
    /// This instant, `nanos` later; stays at the end of time rather than wrap.
    #[must_use]
    pub const fn after(self, nanos: u64) -> Self {
        Self(self.0.saturating_add(nanos))
    }

    /// Nanoseconds since `earlier`; 0 if that is in the future.
    #[must_use]
    pub const fn since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}
