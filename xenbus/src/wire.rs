//! The wire format of the store: `io/xs_wire.h`, and the rules of `docs/misc/xenstore.txt` that both ends apply.
//!
//! A message is a 16-byte [`Header`], little-endian, and up to [`PAYLOAD_MAX`] bytes of payload. Both directions use the
//! same form, so the [`Framer`] and the writers below serve the client and the server alike.

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

use hypercall::DomId;

/// Bytes of a [`Header`] on the wire (`struct xsd_sockmsg`).
pub const HEADER_LEN: usize = 16;
/// Longest payload, in bytes (`XENSTORE_PAYLOAD_MAX`). Exceeding it kills the connection.
pub const PAYLOAD_MAX: usize = 4096;
/// Longest absolute path, in bytes (`XENSTORE_ABS_PATH_MAX`).
pub const ABS_PATH_MAX: usize = 3072;
/// Longest relative path, in bytes (`XENSTORE_REL_PATH_MAX`).
pub const REL_PATH_MAX: usize = 2048;
/// The special watch path fired when a domain is introduced.
pub const INTRODUCE_DOMAIN: &str = "@introduceDomain";
/// The special watch path fired when a domain goes away or shuts down.
pub const RELEASE_DOMAIN: &str = "@releaseDomain";

/// The shared page between a domain and the store's server (`struct xenstore_domain_interface`). Offsets are in bytes.
pub mod interface {
    /// Bytes in each of the two rings (`XENSTORE_RING_SIZE`).
    pub const RING_SIZE: u32 = 1024;
    /// Ring of requests, written by the client.
    pub const REQ: usize = 0;
    /// Ring of replies and watch events, written by the server.
    pub const RSP: usize = 1024;
    /// Consumer index of the request ring, written by the server.
    pub const REQ_CONS: usize = 2048;
    /// Producer index of the request ring, written by the client.
    pub const REQ_PROD: usize = 2052;
    /// Consumer index of the reply ring, written by the client.
    pub const RSP_CONS: usize = 2056;
    /// Producer index of the reply ring, written by the server.
    pub const RSP_PROD: usize = 2060;
    /// Bitmap of `FEATURE_*`, written by the server.
    pub const SERVER_FEATURES: usize = 2064;
    /// One of [`CONNECTED`] and [`RECONNECT`].
    pub const CONNECTION: usize = 2068;
    /// One of `ERROR_*`, written by the server.
    pub const ERROR: usize = 2072;

    /// The ring can be reconnected (`XENSTORE_SERVER_FEATURE_RECONNECTION`).
    pub const FEATURE_RECONNECTION: u32 = 1;
    /// The page has an error field (`XENSTORE_SERVER_FEATURE_ERROR`).
    pub const FEATURE_ERROR: u32 = 2;

    /// The steady state of [`CONNECTION`] (`XENSTORE_CONNECTED`).
    pub const CONNECTED: u32 = 0;
    /// A reconnect is in progress (`XENSTORE_RECONNECT`).
    pub const RECONNECT: u32 = 1;

    /// No error (`XENSTORE_ERROR_NONE`).
    pub const ERROR_NONE: u32 = 0;
    /// Communication problem (`XENSTORE_ERROR_COMM`).
    pub const ERROR_COMM: u32 = 1;
    /// Invalid ring index (`XENSTORE_ERROR_RINGIDX`).
    pub const ERROR_RINGIDX: u32 = 2;
    /// Protocol violation: payload too long (`XENSTORE_ERROR_PROTO`).
    pub const ERROR_PROTO: u32 = 3;
}

/// Type of a message (`enum xsd_sockmsg_type`). Number 20 was XS_RESTRICT, which is gone from the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Kind {
    /// XS_CONTROL, once called XS_DEBUG.
    Control = 0,
    /// XS_DIRECTORY: names of a node's children.
    Directory = 1,
    /// XS_READ.
    Read = 2,
    /// XS_GET_PERMS.
    GetPerms = 3,
    /// XS_WATCH.
    Watch = 4,
    /// XS_UNWATCH.
    Unwatch = 5,
    /// XS_TRANSACTION_START.
    TransactionStart = 6,
    /// XS_TRANSACTION_END.
    TransactionEnd = 7,
    /// XS_INTRODUCE.
    Introduce = 8,
    /// XS_RELEASE.
    Release = 9,
    /// XS_GET_DOMAIN_PATH.
    GetDomainPath = 10,
    /// XS_WRITE.
    Write = 11,
    /// XS_MKDIR.
    Mkdir = 12,
    /// XS_RM.
    Rm = 13,
    /// XS_SET_PERMS.
    SetPerms = 14,
    /// XS_WATCH_EVENT: from the server, unasked; request and transaction are 0.
    WatchEvent = 15,
    /// XS_ERROR: from the server, instead of a reply.
    Error = 16,
    /// XS_IS_DOMAIN_INTRODUCED.
    IsDomainIntroduced = 17,
    /// XS_RESUME.
    Resume = 18,
    /// XS_SET_TARGET.
    SetTarget = 19,
    /// XS_RESET_WATCHES: also ends the caller's transactions.
    ResetWatches = 21,
    /// XS_DIRECTORY_PART: children of a node with more names than one payload holds.
    DirectoryPart = 22,
}

impl Kind {
    /// The type with this number, or `None` if the protocol has none.
    pub const fn from_raw(raw: u32) -> Option<Self> {
        Some(match raw {
            0 => Self::Control,
            1 => Self::Directory,
            2 => Self::Read,
            3 => Self::GetPerms,
            4 => Self::Watch,
            5 => Self::Unwatch,
            6 => Self::TransactionStart,
            7 => Self::TransactionEnd,
            8 => Self::Introduce,
            9 => Self::Release,
            10 => Self::GetDomainPath,
            11 => Self::Write,
            12 => Self::Mkdir,
            13 => Self::Rm,
            14 => Self::SetPerms,
            15 => Self::WatchEvent,
            16 => Self::Error,
            17 => Self::IsDomainIntroduced,
            18 => Self::Resume,
            19 => Self::SetTarget,
            21 => Self::ResetWatches,
            22 => Self::DirectoryPart,
            _ => return None,
        })
    }

    /// The number on the wire.
    pub const fn raw(self) -> u32 {
        self as u32
    }
}

/// Identifies a request on its connection; the reply carries it back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ReqId(pub u32);

/// Identifies a transaction on its connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TxId(pub u32);

impl TxId {
    /// No transaction.
    pub const NONE: Self = Self(0);
}

/// The header of a message (`struct xsd_sockmsg`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// The type's number, as it came: a server answers an unknown one with ENOSYS. See [`Header::kind`].
    pub raw_kind: u32,
    /// Request this belongs to.
    pub req_id: ReqId,
    /// Transaction this belongs to.
    pub tx_id: TxId,
    /// Payload bytes that follow.
    pub len: u32,
}

impl Header {
    /// The type, if its number is a known one.
    pub const fn kind(&self) -> Option<Kind> {
        Kind::from_raw(self.raw_kind)
    }

    /// The 16 bytes of the wire.
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut out = [0; HEADER_LEN];
        let words = [self.raw_kind, self.req_id.0, self.tx_id.0, self.len];
        for (place, word) in out.as_chunks_mut::<4>().0.iter_mut().zip(words) {
            *place = word.to_le_bytes();
        }
        out
    }

    /// Reads a header. Every 16 bytes are some header: limits are the [`Framer`]'s to apply.
    pub fn decode(bytes: &[u8; HEADER_LEN]) -> Self {
        let mut words = bytes.as_chunks::<4>().0.iter().map(|word| u32::from_le_bytes(*word));
        let mut next = || words.next().unwrap_or_default();
        Self { raw_kind: next(), req_id: ReqId(next()), tx_id: TxId(next()), len: next() }
    }
}

/// A whole message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// Its header; `len` is the payload's length.
    pub header: Header,
    /// Its payload, at most [`PAYLOAD_MAX`] bytes.
    pub payload: Vec<u8>,
}

/// A payload is, or would be, longer than [`PAYLOAD_MAX`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("store message payload longer than 4096 bytes")]
pub struct PayloadTooLong;

/// Appends one message to `out`; its payload is the parts in order.
///
/// # Errors
/// The payload would be too long. `out` is then as it was.
pub fn write_message(
    out: &mut Vec<u8>,
    raw_kind: u32,
    req_id: ReqId,
    tx_id: TxId,
    parts: &[&[u8]],
) -> Result<(), PayloadTooLong> {
    let len = parts.iter().map(|part| part.len()).fold(0, usize::saturating_add);
    if len > PAYLOAD_MAX {
        return Err(PayloadTooLong);
    }
    let len = u32::try_from(len).map_err(|_| PayloadTooLong)?;
    out.extend_from_slice(&Header { raw_kind, req_id, tx_id, len }.encode());
    for part in parts {
        out.extend_from_slice(part);
    }
    Ok(())
}

/// Splits a byte stream into messages. Holds at most one unfinished message.
///
/// A length above the limit is an error, and stays one: after it nothing in the stream can be trusted to be a header.
#[derive(Debug, Default)]
pub struct Framer {
    head: [u8; HEADER_LEN],
    head_len: usize,
    body: Option<Message>,
    broken: bool,
}

impl Framer {
    /// A framer at the start of a stream.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes bytes from the front of `input` until a message is whole (returned) or the input is used up (`None`).
    /// Call again, while there is input, for the next message.
    ///
    /// # Errors
    /// The stream announced a payload that is too long. Every later call fails as well.
    pub fn next(&mut self, input: &mut &[u8]) -> Result<Option<Message>, PayloadTooLong> {
        if self.broken {
            return Err(PayloadTooLong);
        }
        if self.body.is_none() {
            let (_, room) = self.head.split_at_mut_checked(self.head_len).unwrap_or_default();
            let take = room.len().min(input.len());
            let (now, rest) = input.split_at_checked(take).unwrap_or_default();
            if let Some(place) = room.get_mut(..take) {
                place.copy_from_slice(now);
            }
            *input = rest;
            self.head_len += take;
            if self.head_len < HEADER_LEN {
                return Ok(None);
            }
            let header = Header::decode(&self.head);
            let len = usize::try_from(header.len).unwrap_or(usize::MAX);
            if len > PAYLOAD_MAX {
                self.broken = true;
                return Err(PayloadTooLong);
            }
            self.body = Some(Message { header, payload: Vec::with_capacity(len) });
        }
        if let Some(message) = &mut self.body {
            let len = usize::try_from(message.header.len).unwrap_or(PAYLOAD_MAX);
            let take = len.saturating_sub(message.payload.len()).min(input.len());
            let (now, rest) = input.split_at_checked(take).unwrap_or_default();
            message.payload.extend_from_slice(now);
            *input = rest;
            if message.payload.len() < len {
                return Ok(None);
            }
        }
        self.head_len = 0;
        Ok(self.body.take())
    }

    /// Whether the stream stands between two messages.
    pub fn is_idle(&self) -> bool {
        self.head_len == 0 && self.body.is_none() && !self.broken
    }
}

macro_rules! errors {
    ($($name:ident: $text:literal,)*) => {
        /// An error the server reports (`xsd_errors`), by name on the wire. A quota that is reached is ENOSPC, a
        /// protocol limit that is exceeded is E2BIG.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
        pub enum XsError {
            $(#[doc = $text] #[error($text)] $name,)*
        }

        impl XsError {
            /// Every error, in the order of the header.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// The name on the wire, without its terminating NUL.
            pub const fn text(self) -> &'static str {
                match self { $(Self::$name => stringify!($name),)* }
            }

            /// The error of this name (no NUL).
            pub fn from_text(text: &[u8]) -> Option<Self> {
                Self::ALL.iter().copied().find(|error| error.text().as_bytes() == text)
            }
        }
    };
}

errors! {
    EINVAL: "invalid argument",
    EACCES: "permission denied",
    EEXIST: "exists",
    EISDIR: "is a directory",
    ENOENT: "no such node",
    ENOMEM: "out of memory",
    ENOSPC: "quota reached",
    EIO: "input/output error",
    ENOTEMPTY: "not empty",
    ENOSYS: "not implemented",
    EROFS: "read-only",
    EBUSY: "busy",
    EAGAIN: "transaction conflict, try again",
    EISCONN: "already connected",
    E2BIG: "too big",
    EPERM: "not permitted",
}

/// What a domain may do to a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Access {
    /// `n`: nothing.
    None,
    /// `r`.
    Read,
    /// `w`.
    Write,
    /// `b`: both.
    Both,
}

impl Access {
    /// Whether reading is included.
    pub const fn can_read(self) -> bool {
        matches!(self, Self::Read | Self::Both)
    }

    /// Whether writing is included.
    pub const fn can_write(self) -> bool {
        matches!(self, Self::Write | Self::Both)
    }
}

/// One entry of a node's permissions, `n0` or `r5` on the wire. The first entry of a node's list names its owner, who may
/// do everything; its access is that of every domain not listed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Perm {
    /// What the domain may do.
    pub access: Access,
    /// The domain.
    pub domid: DomId,
}

impl Perm {
    /// An entry.
    pub const fn new(access: Access, domid: DomId) -> Self {
        Self { access, domid }
    }

    /// Reads an entry: one letter and a strict decimal number.
    pub fn parse(text: &[u8]) -> Option<Self> {
        let (letter, number) = text.split_first()?;
        let access = match letter {
            b'n' => Access::None,
            b'r' => Access::Read,
            b'w' => Access::Write,
            b'b' => Access::Both,
            _ => return None,
        };
        Some(Self { access, domid: DomId(u16::try_from(parse_u32(number)?).ok()?) })
    }
}

impl fmt::Display for Perm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let letter = match self.access {
            Access::None => 'n',
            Access::Read => 'r',
            Access::Write => 'w',
            Access::Both => 'b',
        };
        write!(f, "{letter}{}", self.domid.0)
    }
}

/// Reads a list of permissions, each terminated by a NUL; `None` if it is empty or any entry is malformed.
pub fn parse_perms(payload: &[u8]) -> Option<Vec<Perm>> {
    let mut perms = Vec::new();
    let mut rest = payload;
    while !rest.is_empty() {
        let (text, after) = split_nul(rest)?;
        perms.push(Perm::parse(text)?);
        rest = after;
    }
    (!perms.is_empty()).then_some(perms)
}

/// The wire form of a list of permissions, each terminated by a NUL.
pub fn format_perms(perms: &[Perm]) -> String {
    use fmt::Write as _;
    let mut out = String::new();
    for perm in perms {
        // Writing to a String cannot fail.
        let _ = write!(out, "{perm}\0");
    }
    out
}

/// Splits at the first NUL: the string before it and what follows; `None` without a NUL.
pub fn split_nul(payload: &[u8]) -> Option<(&[u8], &[u8])> {
    let end = payload.iter().position(|&byte| byte == 0)?;
    let (text, rest) = payload.split_at_checked(end)?;
    Some((text, rest.split_first()?.1))
}

/// The only argument of a payload that must be one string with its NUL at the very end.
pub fn single_string(payload: &[u8]) -> Option<&[u8]> {
    split_nul(payload).and_then(|(text, rest)| rest.is_empty().then_some(text))
}

/// Reads a number in strict decimal: 1 to 10 ASCII digits, at most `u32::MAX`, and nothing else. Signs, blanks, prefixes,
/// NULs and trailing text are refused: such a value was not written by a peer that means well.
pub fn parse_u32(text: &[u8]) -> Option<u32> {
    if text.is_empty() || text.len() > 10 {
        return None;
    }
    text.iter().try_fold(0u32, |number, byte| {
        let digit = byte.is_ascii_digit().then(|| u32::from(byte - b'0'))?;
        number.checked_mul(10)?.checked_add(digit)
    })
}

fn valid_chars(path: &[u8]) -> bool {
    path.iter().all(|byte| byte.is_ascii_alphanumeric() || b"-/_@".contains(byte))
}

/// Whether this is a well-formed absolute path: it starts with `/`, has no `//` and no trailing `/` (but for the root
/// itself), only letters, digits and `-/_@`, at most [`REL_PATH_MAX`] bytes below `/local/domain/<n>/` or in all.
pub fn valid_path(path: &[u8]) -> bool {
    let relative = path.strip_prefix(b"/local/domain/").and_then(|rest| {
        let digits = rest.iter().take(5).take_while(|byte| byte.is_ascii_digit()).count();
        let (digits, rest) = rest.split_at_checked(digits)?;
        if digits.is_empty() { None } else { rest.strip_prefix(b"/") }
    });
    path.starts_with(b"/")
        && (path == b"/" || !path.ends_with(b"/"))
        && !path.windows(2).any(|pair| pair == b"//")
        && relative.unwrap_or(path).len() <= REL_PATH_MAX
        && valid_chars(path)
}

/// Whether this is a well-formed path relative to the caller's own directory, `/local/domain/<n>`.
pub fn valid_relative_path(path: &[u8]) -> bool {
    !path.is_empty()
        && !path.starts_with(b"/")
        && !path.starts_with(b"@")
        && !path.ends_with(b"/")
        && !path.windows(2).any(|pair| pair == b"//")
        && path.len() <= REL_PATH_MAX
        && valid_chars(path)
}

/// Whether this names a special watch: `@introduceDomain`, `@releaseDomain` and their like.
pub fn valid_special_path(path: &[u8]) -> bool {
    path.len() > 1 && path.starts_with(b"@") && path.len() <= REL_PATH_MAX && valid_chars(path)
}

#[cfg(test)]
mod tests;
