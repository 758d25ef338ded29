//! What Xen answers: an errno for a whole hypercall, a status for each grant operation.

use core::fmt;

/// A hypercall's failure, as the positive number of errno.h (xen/errno.h has the same numbers).
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Errno(pub i32);

impl Errno {
    /// Not permitted (`EPERM`).
    pub const PERM: Self = Self(1);
    /// No such thing (`ENOENT`).
    pub const NOENT: Self = Self(2);
    /// No such domain (`ESRCH`).
    pub const SRCH: Self = Self(3);
    /// Out of memory (`ENOMEM`).
    pub const NOMEM: Self = Self(12);
    /// Access denied (`EACCES`).
    pub const ACCES: Self = Self(13);
    /// A bad guest address (`EFAULT`).
    pub const FAULT: Self = Self(14);
    /// In use (`EBUSY`).
    pub const BUSY: Self = Self(16);
    /// A bad argument (`EINVAL`).
    pub const INVAL: Self = Self(22);
    /// No space, or no port left (`ENOSPC`).
    pub const NOSPC: Self = Self(28);
    /// This Xen has no such operation (`ENOSYS`).
    pub const NOSYS: Self = Self(38);
    /// Not supported (`EOPNOTSUPP`).
    pub const OPNOTSUPP: Self = Self(95);

    /// Splits a hypercall's return value: 0 and above is a result, below is an error.
    ///
    /// # Errors
    /// The errno, where the value is negative.
    pub const fn check(rc: i64) -> Result<u64, Self> {
        if rc >= 0 {
            Ok(rc.unsigned_abs())
        } else if rc >= -4095 {
            Err(Self(-rc as i32))
        } else {
            Err(Self::INVAL)
        }
    }
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match *self {
            Self::PERM => "EPERM",
            Self::NOENT => "ENOENT",
            Self::SRCH => "ESRCH",
            Self::NOMEM => "ENOMEM",
            Self::ACCES => "EACCES",
            Self::FAULT => "EFAULT",
            Self::BUSY => "EBUSY",
            Self::INVAL => "EINVAL",
            Self::NOSPC => "ENOSPC",
            Self::NOSYS => "ENOSYS",
            Self::OPNOTSUPP => "EOPNOTSUPP",
            Self(other) => return write!(f, "errno {other}"),
        };
        f.write_str(name)
    }
}

impl core::error::Error for Errno {}

/// The status of one grant operation (`GNTST_*`, grant_table.h). Only [`GrantStatus::OKAY`] is success.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct GrantStatus(pub i16);

impl GrantStatus {
    /// Done.
    pub const OKAY: Self = Self(0);
    /// Undefined error.
    pub const GENERAL_ERROR: Self = Self(-1);
    /// No such domain.
    pub const BAD_DOMAIN: Self = Self(-2);
    /// The reference is not granted, not to us, or not in the way asked for.
    pub const BAD_GNTREF: Self = Self(-3);
    /// No such mapping.
    pub const BAD_HANDLE: Self = Self(-4);
    /// The address to map at will not do.
    pub const BAD_VIRT_ADDR: Self = Self(-5);
    /// The bus address to unmap will not do.
    pub const BAD_DEV_ADDR: Self = Self(-6);
    /// No room for another mapping (maptrack or IOMMU).
    pub const NO_DEVICE_SPACE: Self = Self(-7);
    /// Not privileged enough.
    pub const PERMISSION_DENIED: Self = Self(-8);
    /// The page itself will not do.
    pub const BAD_PAGE: Self = Self(-9);
    /// A copy that would cross a page boundary.
    pub const BAD_COPY_ARG: Self = Self(-10);
    /// The address is too large for the operation.
    pub const ADDRESS_TOO_BIG: Self = Self(-11);
    /// Not done; the granter's page is being moved or paged in. Try again.
    pub const EAGAIN: Self = Self(-12);
    /// Out of handles or the like.
    pub const NO_SPACE: Self = Self(-13);
    /// What we put there before the call, which Xen never answers: the operation was never looked at.
    pub const UNTOUCHED: Self = Self(i16::MAX);

    /// Whether the operation was done. Positive values, which Xen does not define, are not success.
    #[must_use]
    pub const fn is_ok(self) -> bool {
        self.0 == 0
    }
}

impl fmt::Debug for GrantStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for GrantStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match *self {
            Self::OKAY => "okay",
            Self::GENERAL_ERROR => "general error",
            Self::BAD_DOMAIN => "bad domain",
            Self::BAD_GNTREF => "bad grant reference",
            Self::BAD_HANDLE => "bad handle",
            Self::BAD_VIRT_ADDR => "bad address",
            Self::BAD_DEV_ADDR => "bad device address",
            Self::NO_DEVICE_SPACE => "no device space",
            Self::PERMISSION_DENIED => "permission denied",
            Self::BAD_PAGE => "bad page",
            Self::BAD_COPY_ARG => "copy crosses a page",
            Self::ADDRESS_TOO_BIG => "address too big",
            Self::EAGAIN => "try again",
            Self::NO_SPACE => "no space",
            Self::UNTOUCHED => "untouched",
            Self(other) => return write!(f, "status {other}"),
        };
        f.write_str(name)
    }
}

impl core::error::Error for GrantStatus {}
