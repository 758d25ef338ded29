//! Who holds what.

use std::collections::BTreeSet;
use std::fmt;
use std::num::NonZeroUsize;

use hypercall::abi::GTF_READONLY;
use hypercall::{DomId, Gfn, GrantRef, MapHandle, Port};

use crate::State;
use crate::events::PortState;
use crate::memory::ShownBy;

/// Something that a domain holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Item {
    /// Pages from its allocator, but for those in which Xen has its events: the domain cannot take them back.
    Pages {
        /// The first.
        first: Gfn,
        /// How many.
        count: NonZeroUsize,
    },
    /// An open entry in its grant table.
    Grant {
        /// Which.
        gref: GrantRef,
        /// For whom.
        to: DomId,
        /// Which of its frames.
        frame: Gfn,
        /// For reading only.
        read_only: bool,
    },
    /// A mapping of another's grant.
    Mapping {
        /// Its number.
        handle: MapHandle,
        /// Whose page.
        of: DomId,
        /// By which reference.
        gref: GrantRef,
        /// Where.
        at: Gfn,
        /// For reading only.
        read_only: bool,
    },
    /// A frame of another's, mapped by right.
    Foreign {
        /// Whose.
        of: DomId,
        /// Which.
        frame: Gfn,
        /// Where.
        at: Gfn,
    },
    /// A page of another's at its machine frame number, besides where it is mapped (XENFEAT bit 12).
    Alias {
        /// Whose.
        of: DomId,
        /// Where.
        at: Gfn,
        /// For reading only.
        read_only: bool,
    },
    /// Space to map at, with nothing there.
    Window {
        /// Where.
        at: Gfn,
    },
    /// An event channel.
    Port {
        /// Which.
        port: Port,
        /// What it is joined to.
        state: PortState,
    },
}

impl Item {
    /// Whom it concerns besides its holder.
    fn other(&self) -> Option<DomId> {
        match *self {
            Self::Grant { to, .. } => Some(to),
            Self::Mapping { of, .. } | Self::Foreign { of, .. } | Self::Alias { of, .. } => {
                Some(of)
            }
            Self::Port { state: PortState::Interdomain(other, _), .. } => Some(other),
            Self::Port { state: PortState::Unbound(other), .. } => Some(other),
            Self::Pages { .. } | Self::Window { .. } | Self::Port { .. } => None,
        }
    }
}

fn access(read_only: bool) -> &'static str {
    if read_only { "for reading" } else { "for writing" }
}

impl fmt::Display for Item {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pages { first, count } => write!(f, "{count} pages at gfn {:#x}", first.0),
            Self::Grant { gref, to, frame, read_only } => {
                write!(f, "reference {gref} to d{to}, gfn {:#x} {}", frame.0, access(*read_only))
            }
            Self::Mapping { handle, of, gref, at, read_only } => {
                write!(f, "mapping {handle} of d{of}'s reference {gref} ")?;
                write!(f, "at gfn {:#x} {}", at.0, access(*read_only))
            }
            Self::Foreign { of, frame, at } => {
                write!(f, "foreign map of d{of}'s gfn {:#x} at gfn {:#x}", frame.0, at.0)
            }
            Self::Alias { of, at, read_only } => {
                write!(f, "alias of d{of}'s page at gfn {:#x} {}", at.0, access(*read_only))
            }
            Self::Window { at } => write!(f, "window at gfn {:#x}", at.0),
            Self::Port { port, state } => match state {
                PortState::Free => write!(f, "port {port}, free"),
                PortState::Unbound(remote) => write!(f, "port {port}, unbound, for d{remote}"),
                PortState::Interdomain(remote, other) => {
                    write!(f, "port {port}, joined to d{remote}'s port {other}")
                }
                PortState::Virq(virq, vcpu) => write!(f, "port {port}, virq {virq} of vcpu {vcpu}"),
            },
        }
    }
}

/// All that domains held at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ledger {
    entries: BTreeSet<(DomId, Item)>,
}

impl Ledger {
    pub(crate) fn of(state: &State) -> Self {
        let mut entries = BTreeSet::new();
        for (id, domain) in &state.domains {
            let mut add = |item| entries.insert((*id, item));
            let held = |frame| domain.events.fifo.as_ref().is_some_and(|fifo| fifo.holds(frame));
            for (first, count) in domain.memory.blocks().filter(|(first, _)| !held(*first)) {
                add(Item::Pages { first, count });
            }
            for (gref, entry) in domain.grants.open() {
                let (frame, to) = (Gfn(entry.frame.into()), entry.domid);
                add(Item::Grant { gref, to, frame, read_only: entry.flags & GTF_READONLY != 0 });
            }
            for (handle, map) in domain.grants.mappings() {
                let (of, gref, at, read_only) = (map.of, map.gref, map.at, map.read_only);
                add(Item::Mapping { handle, of, gref, at, read_only });
            }
            for (at, shown) in domain.memory.windows() {
                match shown.map(|shown| shown.by) {
                    None => add(Item::Window { at }),
                    Some(ShownBy::Foreign(of, frame, _)) => add(Item::Foreign { of, frame, at }),
                    Some(ShownBy::Grant { .. }) => continue,
                };
            }
            for (mfn, read_only) in domain.memory.aliases() {
                let of = state.machine.owner(mfn).unwrap_or(DomId::SELF);
                add(Item::Alias { of, at: Gfn(mfn.0), read_only });
            }
            for (port, state) in domain.events.ports() {
                add(Item::Port { port, state });
            }
        }
        Self { entries }
    }

    /// Each thing, and who holds it.
    pub fn entries(&self) -> impl Iterator<Item = (DomId, Item)> {
        self.entries.iter().copied()
    }

    /// What a domain holds.
    #[must_use]
    pub fn held_by(&self, id: DomId) -> Self {
        Self { entries: self.entries().filter(|(holder, _)| *holder == id).collect() }
    }

    /// What a domain holds, and what others hold of it.
    #[must_use]
    pub fn concerning(&self, id: DomId) -> Self {
        let concerns = |(holder, item): &(DomId, Item)| *holder == id || item.other() == Some(id);
        Self { entries: self.entries().filter(concerns).collect() }
    }

    /// The mappings, by grant or by right.
    #[must_use]
    pub fn mappings(&self) -> Self {
        let mapped =
            |(_, item): &(DomId, Item)| matches!(item, Item::Mapping { .. } | Item::Foreign { .. });
        Self { entries: self.entries().filter(mapped).collect() }
    }

    /// How many things.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether nobody holds anything.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// What came and went since an earlier moment. Prints as one line for each thing, so a test that compares the text with ""
    /// says what leaked.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> LedgerDiff {
        LedgerDiff {
            came: Self { entries: self.entries.difference(&earlier.entries).copied().collect() },
            went: Self { entries: earlier.entries.difference(&self.entries).copied().collect() },
        }
    }
}

impl fmt::Display for Ledger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (holder, item) in &self.entries {
            writeln!(f, "d{holder}: {item}")?;
        }
        Ok(())
    }
}

/// The difference of two ledgers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LedgerDiff {
    /// Held now, not before.
    pub came: Ledger,
    /// Held before, not now.
    pub went: Ledger,
}

impl LedgerDiff {
    /// Whether all is as it was.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.came.is_empty() && self.went.is_empty()
    }
}

impl fmt::Display for LedgerDiff {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (holder, item) in &self.came.entries {
            writeln!(f, "+ d{holder}: {item}")?;
        }
        for (holder, item) in &self.went.entries {
            writeln!(f, "- d{holder}: {item}")?;
        }
        Ok(())
    }
}
