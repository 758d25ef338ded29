//! The control ring (io/netif.h): what the frontend asks for out of band, such as hashing and static grants.

use hypercall::GrantRef;

use crate::ring::{BackRing, FrontRing};
use crate::slot::{halves, slot, word};

/// The backend's end of a control ring.
pub type CtrlBackRing<M> = BackRing<M, CtrlRequest, CtrlResponse>;
/// The frontend's end of a control ring.
pub type CtrlFrontRing<M> = FrontRing<M, CtrlRequest, CtrlResponse>;

/// What is asked for (`XEN_NETIF_CTRL_TYPE_*`).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
#[repr(transparent)]
pub struct CtrlType(pub u16);

impl CtrlType {
    /// `XEN_NETIF_CTRL_TYPE_GET_HASH_FLAGS`
    pub const GET_HASH_FLAGS: Self = Self(1);
    /// `XEN_NETIF_CTRL_TYPE_SET_HASH_FLAGS`
    pub const SET_HASH_FLAGS: Self = Self(2);
    /// `XEN_NETIF_CTRL_TYPE_SET_HASH_KEY`
    pub const SET_HASH_KEY: Self = Self(3);
    /// `XEN_NETIF_CTRL_TYPE_GET_HASH_MAPPING_SIZE`
    pub const GET_HASH_MAPPING_SIZE: Self = Self(4);
    /// `XEN_NETIF_CTRL_TYPE_SET_HASH_MAPPING_SIZE`
    pub const SET_HASH_MAPPING_SIZE: Self = Self(5);
    /// `XEN_NETIF_CTRL_TYPE_SET_HASH_MAPPING`
    pub const SET_HASH_MAPPING: Self = Self(6);
    /// `XEN_NETIF_CTRL_TYPE_SET_HASH_ALGORITHM`
    pub const SET_HASH_ALGORITHM: Self = Self(7);
    /// `XEN_NETIF_CTRL_TYPE_GET_GREF_MAPPING_SIZE`
    pub const GET_GREF_MAPPING_SIZE: Self = Self(8);
    /// `XEN_NETIF_CTRL_TYPE_ADD_GREF_MAPPING`
    pub const ADD_GREF_MAPPING: Self = Self(9);
    /// `XEN_NETIF_CTRL_TYPE_DEL_GREF_MAPPING`
    pub const DEL_GREF_MAPPING: Self = Self(10);
}

/// How it ended (`XEN_NETIF_CTRL_STATUS_*`).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
#[repr(transparent)]
pub struct CtrlStatus(pub u32);

impl CtrlStatus {
    /// `XEN_NETIF_CTRL_STATUS_SUCCESS`
    pub const SUCCESS: Self = Self(0);
    /// `XEN_NETIF_CTRL_STATUS_NOT_SUPPORTED`
    pub const NOT_SUPPORTED: Self = Self(1);
    /// `XEN_NETIF_CTRL_STATUS_INVALID_PARAMETER`
    pub const INVALID_PARAMETER: Self = Self(2);
    /// `XEN_NETIF_CTRL_STATUS_BUFFER_OVERFLOW`
    pub const BUFFER_OVERFLOW: Self = Self(3);
}

/// `struct xen_netif_ctrl_request`
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct CtrlRequest {
    /// Echoed in the response.
    pub id: u16,
    /// What is asked for.
    pub kind: CtrlType,
    /// Depends on it.
    pub data: [u32; 3],
}

impl CtrlRequest {
    /// From the words of the slot.
    #[must_use]
    pub const fn decode([first, a, b, c]: [u32; 4]) -> Self {
        let (id, kind) = halves(first);
        Self { id, kind: CtrlType(kind), data: [a, b, c] }
    }

    /// The words of the slot.
    #[must_use]
    pub const fn encode(self) -> [u32; 4] {
        let [a, b, c] = self.data;
        [word(self.id, self.kind.0), a, b, c]
    }
}
slot!(CtrlRequest, 4);

/// `struct xen_netif_ctrl_response`
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct CtrlResponse {
    /// Of the request this answers,
    pub id: u16,
    /// and what that asked for.
    pub kind: CtrlType,
    /// How it ended.
    pub status: CtrlStatus,
    /// Depends on what was asked for.
    pub data: u32,
}

impl CtrlResponse {
    /// From the words of the slot.
    #[must_use]
    pub const fn decode([first, status, data]: [u32; 3]) -> Self {
        let (id, kind) = halves(first);
        Self { id, kind: CtrlType(kind), status: CtrlStatus(status), data }
    }

    /// The words of the slot.
    #[must_use]
    pub const fn encode(self) -> [u32; 3] {
        [word(self.id, self.kind.0), self.status.0, self.data]
    }
}
slot!(CtrlResponse, 3);

/// An entry in the page of an `ADD_GREF_MAPPING` or `DEL_GREF_MAPPING` request (`struct xen_netif_gref`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct StaticGrant {
    /// The reference to keep mapped, or to let go.
    pub gref: GrantRef,
    /// `XEN_NETIF_CTRLF_GREF_readonly`: map it read-only.
    pub readonly: bool,
    /// Out: how it ended.
    pub status: CtrlStatus,
}

impl StaticGrant {
    /// Bytes of an entry.
    pub const SIZE: usize = 8;
    /// `XEN_NETIF_CTRLF_GREF_readonly`
    pub const READONLY: u16 = 1;

    /// From the words of the entry.
    #[must_use]
    pub const fn decode([gref, second]: [u32; 2]) -> Self {
        let (flags, status) = halves(second);
        let readonly = flags & Self::READONLY != 0;
        Self { gref: GrantRef(gref), readonly, status: CtrlStatus(status as u32) }
    }

    /// The words of the entry.
    #[must_use]
    pub const fn encode(self) -> [u32; 2] {
        let flags = if self.readonly { Self::READONLY } else { 0 };
        [self.gref.0, word(flags, self.status.0 as u16)]
    }
}
