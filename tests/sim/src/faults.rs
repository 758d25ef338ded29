//! What is made to go wrong, and counting what is done.

use std::fmt;
use std::ops::Sub;
use std::sync::atomic::{AtomicU64, Ordering};

use hypercall::{Errno, GrantStatus};

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident = $text:literal),* $(,)?) => {
        /// What a domain can ask for: each method of `Hypervisor` and `Toolstack` that can fail.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Kind {
            $($(#[$doc])* $name,)*
        }

        impl Kind {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$name),*];

            /// Its name in tables.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$name => $text),* }
            }
        }
    };
}

kinds! {
    /// `features`
    Features = "features",
    /// `notify`
    Notify = "notify",
    /// `alloc_unbound`
    AllocUnbound = "alloc unbound",
    /// `bind_interdomain`
    BindInterdomain = "bind interdomain",
    /// `bind_virq`
    BindVirq = "bind virq",
    /// `unmask`
    Unmask = "unmask",
    /// `close`
    Close = "close",
    /// `init_control`
    InitControl = "init control",
    /// `expand_array`
    ExpandArray = "expand array",
    /// `grant_copy`
    Copy = "grant copy",
    /// `grant_map`
    Map = "grant map",
    /// `grant_unmap`
    Unmap = "grant unmap",
    /// `cache_flush`
    CacheFlush = "cache flush",
    /// `grant_table_size`
    TableSize = "grant table size",
    /// `grant_table_frame`
    TableFrame = "grant table frame",
    /// `alloc_pages`; any fault means `None`
    AllocPages = "alloc pages",
    /// `window`; any fault means `None`
    Window = "window",
    /// `domain_info`
    DomainInfo = "domain info",
    /// `destroy_domain`
    DestroyDomain = "destroy domain",
    /// `hvm_param`
    HvmParam = "get hvm param",
    /// `set_hvm_param`
    SetHvmParam = "set hvm param",
    /// `populate`
    Populate = "populate",
    /// `map_foreign`
    MapForeign = "map foreign",
    /// `unmap_foreign`
    UnmapForeign = "unmap foreign",
}

const KINDS: usize = Kind::ALL.len();

impl Kind {
    /// Whether its calls are batches of operations with a status each.
    #[must_use]
    pub const fn is_batch(self) -> bool {
        matches!(self, Self::Copy | Self::Map | Self::Unmap)
    }

    /// What is most likely to go wrong with it on real Xen: for batches with one operation, else with the call.
    #[must_use]
    pub const fn natural_fault(self) -> Fault {
        match self {
            Self::Copy | Self::Unmap => Fault::Status(GrantStatus::GENERAL_ERROR),
            Self::Map => Fault::Status(GrantStatus::NO_SPACE),
            _ => Fault::Errno(self.natural_errno()),
        }
    }

    const fn natural_errno(self) -> Errno {
        match self {
            Self::Features | Self::Copy | Self::Map | Self::Unmap => Errno::FAULT,
            Self::AllocUnbound | Self::BindVirq | Self::TableFrame => Errno::NOSPC,
            Self::AllocPages | Self::Window | Self::Populate | Self::MapForeign => Errno::NOMEM,
            Self::Notify | Self::BindInterdomain | Self::Unmask | Self::Close => Errno::INVAL,
            Self::CacheFlush | Self::HvmParam | Self::SetHvmParam => Errno::INVAL,
            Self::TableSize => Errno::PERM,
            Self::InitControl => Errno::NOSYS,
            Self::ExpandArray => Errno::NOMEM,
            Self::DomainInfo => Errno::SRCH,
            Self::DestroyDomain => Errno::BUSY,
            Self::UnmapForeign => Errno::NOENT,
        }
    }
}

/// Calls, operations within them (for those that take batches) and bytes copied.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    calls: [AtomicU64; KINDS],
    ops: [AtomicU64; KINDS],
    bytes: AtomicU64,
}

impl Tally {
    pub(crate) fn call(&self, kind: Kind, ops: usize) {
        if let (Some(calls), Some(done)) =
            (self.calls.get(kind as usize), self.ops.get(kind as usize))
        {
            calls.fetch_add(1, Ordering::Relaxed);
            done.fetch_add(ops as u64, Ordering::Relaxed);
        }
    }

    pub(crate) fn copied(&self, bytes: u16) {
        self.bytes.fetch_add(bytes.into(), Ordering::Relaxed);
    }

    pub(crate) fn read(&self) -> Hypercalls {
        let load = |from: &[AtomicU64; KINDS]| from.each_ref().map(|n| n.load(Ordering::Relaxed));
        Hypercalls {
            calls: load(&self.calls),
            ops: load(&self.ops),
            bytes: self.bytes.load(Ordering::Relaxed),
        }
    }
}

/// How much a domain has asked for so far. The difference of two says what happened between them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hypercalls {
    calls: [u64; KINDS],
    ops: [u64; KINDS],
    bytes: u64,
}

impl Hypercalls {
    /// Calls of a kind.
    #[must_use]
    pub fn calls(&self, kind: Kind) -> u64 {
        self.calls.get(kind as usize).copied().unwrap_or(0)
    }

    /// Operations in the calls of a kind; 1 each where a call is no batch.
    #[must_use]
    pub fn ops(&self, kind: Kind) -> u64 {
        self.ops.get(kind as usize).copied().unwrap_or(0)
    }

    /// All that can go wrong by itself: each call, and each operation of a batch whose operations have statuses. One more than
    /// the highest `passed` that [`FaultPlan::step`] has any use for, on a trace that does just this.
    #[must_use]
    pub fn steps(&self) -> u64 {
        let of =
            |kind: &Kind| self.calls(*kind) + if kind.is_batch() { self.ops(*kind) } else { 0 };
        Kind::ALL.iter().map(of).sum()
    }

    /// Calls of all kinds: what [`FaultPlan::any`] counts for faults of calls.
    #[must_use]
    pub fn all_calls(&self) -> u64 {
        Kind::ALL.iter().map(|kind| self.calls(*kind)).sum()
    }

    /// Operations of all batches whose operations have statuses: what [`FaultPlan::any`] counts for faults of operations.
    #[must_use]
    pub fn all_ops(&self) -> u64 {
        self.steps() - self.all_calls()
    }

    /// Bytes moved by grant copies that succeeded.
    #[must_use]
    pub fn bytes_copied(&self) -> u64 {
        self.bytes
    }
}

fn less(mut one: [u64; KINDS], other: [u64; KINDS]) -> [u64; KINDS] {
    for (one, other) in one.iter_mut().zip(other) {
        *one -= other;
    }
    one
}

impl Sub for Hypercalls {
    type Output = Self;

    fn sub(self, earlier: Self) -> Self {
        Self {
            calls: less(self.calls, earlier.calls),
            ops: less(self.ops, earlier.ops),
            bytes: self.bytes - earlier.bytes,
        }
    }
}

impl fmt::Display for Hypercalls {
    /// One line for each kind that was used.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for kind in Kind::ALL.iter().filter(|kind| self.calls(**kind) != 0) {
            let (calls, ops) = (self.calls(*kind), self.ops(*kind));
            writeln!(f, "{:18}{calls:10} calls{ops:10} operations", kind.name())?;
        }
        if self.bytes != 0 {
            writeln!(f, "{:18}{:10} bytes", "copied", self.bytes)?;
        }
        Ok(())
    }
}

/// How something goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The call fails and nothing is done.
    Errno(Errno),
    /// The first operations of a batch are done, then the call fails; the rest is never looked at.
    Partial(usize, Errno),
    /// One operation of a batch is not done and gets this status (any number, also ones that Xen never gives).
    Status(GrantStatus),
    /// One operation of a batch is not done and its status is left as it was.
    Untouched,
    /// A call, or an operation of a batch, whichever is next: it fails as is most natural for its kind. A call of which an
    /// operation fails so has succeeded; one that fails itself has done nothing.
    Natural,
}

impl Fault {
    fn is_for(self, of_call: bool) -> bool {
        match self {
            Self::Errno(_) | Self::Partial(..) => of_call,
            Self::Status(_) | Self::Untouched => !of_call,
            Self::Natural => true,
        }
    }
}

/// A fault to come: which operation it hits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FaultPlan {
    /// Only operations of this kind; `None` for any.
    pub kind: Option<Kind>,
    /// How many to let pass. For [`Fault::Errno`] and [`Fault::Partial`] these are calls, for the others operations
    /// within batches; for [`Fault::Natural`] they are steps: both, in the order in which Xen comes to them.
    pub after: u64,
    /// How many to hit then.
    pub times: u64,
    /// What happens to them.
    pub fault: Fault,
}

impl FaultPlan {
    /// The next of a kind.
    #[must_use]
    pub const fn next(kind: Kind, fault: Fault) -> Self {
        Self { kind: Some(kind), after: 0, times: 1, fault }
    }

    /// All of a kind from now on.
    #[must_use]
    pub const fn every(kind: Kind, fault: Fault) -> Self {
        Self { kind: Some(kind), after: 0, times: u64::MAX, fault }
    }

    /// The one after `passed` others of a kind.
    #[must_use]
    pub const fn nth(kind: Kind, passed: u64, fault: Fault) -> Self {
        Self { kind: Some(kind), after: passed, times: 1, fault }
    }

    /// The one after `passed` others, of whatever kind: for [`Fault::Errno`] and [`Fault::Partial`] a call, for
    /// [`Fault::Status`] and [`Fault::Untouched`] an operation of a batch, each in one sequence over all that the domain does.
    #[must_use]
    pub const fn any(passed: u64, fault: Fault) -> Self {
        Self { kind: None, after: passed, times: 1, fault }
    }

    /// The step after `passed` others goes wrong in the way that is natural for it, whether it is a call or an operation.
    /// For every `passed` below the [`Hypercalls::steps`] of a trace: everything that the trace does fails once.
    #[must_use]
    pub const fn step(passed: u64) -> Self {
        Self::any(passed, Fault::Natural)
    }
}

/// A domain's faults to come, in the order they were planned.
#[derive(Debug, Default)]
pub(crate) struct Faults(Vec<FaultPlan>);

impl Faults {
    pub(crate) fn plan(&mut self, plan: FaultPlan) {
        self.0.push(plan);
    }

    pub(crate) fn clear(&mut self) -> usize {
        std::mem::take(&mut self.0).len()
    }

    pub(crate) fn left(&self) -> usize {
        self.0.len()
    }

    fn strike(&mut self, kind: Kind, of_call: bool) -> Option<Fault> {
        if self.0.is_empty() {
            return None;
        }
        let mut hit = None;
        for plan in &mut self.0 {
            if plan.kind.is_some_and(|only| only != kind) || !plan.fault.is_for(of_call) {
                continue;
            }
            if plan.after > 0 {
                plan.after -= 1;
            } else if hit.is_none() && plan.times > 0 {
                plan.times -= 1;
                hit = Some(plan.fault);
            }
        }
        self.0.retain(|plan| plan.times != 0);
        match hit? {
            Fault::Natural if of_call => Some(Fault::Errno(kind.natural_errno())),
            Fault::Natural => Some(kind.natural_fault()),
            other => Some(other),
        }
    }

    /// Whether this call goes wrong.
    pub(crate) fn call(&mut self, kind: Kind) -> Option<Fault> {
        self.strike(kind, true)
    }

    /// Whether this operation of a batch goes wrong.
    pub(crate) fn op(&mut self, kind: Kind) -> Option<Fault> {
        self.strike(kind, false)
    }
}
