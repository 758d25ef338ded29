//! Device states (`enum xenbus_state`, `io/xenbus.h`) and what each end does about the other's.
//!
//! Both ends are pure functions from states to an [`Action`]. They remember nothing, so a watch that fires twice, or once
//! for many changes, leads to the same place: read the peer's state when it is time to act, ask, do, and write.

pub use crate::wire::parse_u32;

/// The state of one end of a device, as in its `state` node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum State {
    /// 0: no node, or one that holds no state.
    Unknown = 0,
    /// 1: nothing offered yet.
    Initialising = 1,
    /// 2: a backend has written what it offers.
    InitWait = 2,
    /// 3: ready, with the other end's answer missing; network devices skip it.
    Initialised = 3,
    /// 4: rings in use.
    Connected = 4,
    /// 5: rings no longer in use, by this end.
    Closing = 5,
    /// 6: closed.
    Closed = 6,
    /// 7: a frontend asks for its changed parameters to be read.
    Reconfiguring = 7,
    /// 8: a backend has read them.
    Reconfigured = 8,
}

impl State {
    /// Every state, in the order of the numbers.
    pub const ALL: [Self; 9] = [
        Self::Unknown,
        Self::Initialising,
        Self::InitWait,
        Self::Initialised,
        Self::Connected,
        Self::Closing,
        Self::Closed,
        Self::Reconfiguring,
        Self::Reconfigured,
    ];

    /// Reads the value of a `state` node; a missing node or anything but a strict decimal number up to 8 is `Unknown`.
    pub fn parse(value: Option<&[u8]>) -> Self {
        value
            .and_then(parse_u32)
            .and_then(|number| Self::ALL.into_iter().find(|state| *state as u32 == number))
            .unwrap_or(Self::Unknown)
    }

    /// The value of a `state` node.
    pub const fn text(self) -> &'static str {
        match self {
            Self::Unknown => "0",
            Self::Initialising => "1",
            Self::InitWait => "2",
            Self::Initialised => "3",
            Self::Connected => "4",
            Self::Closing => "5",
            Self::Closed => "6",
            Self::Reconfiguring => "7",
            Self::Reconfigured => "8",
        }
    }
}

/// What an end has to do. States are written one by one, in order: a peer may wait for any of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Action {
    /// Nothing.
    None,
    /// Write these states.
    Switch(&'static [State]),
    /// Read what the peer has written, attach or publish the rings, then write [`State::Connected`]; if that fails, write
    /// an error node and [`State::Closing`]. It is asked for until the state has changed: start it once.
    Connect,
    /// Both ends are connected (asked of a frontend): carrier on, announce the address. Repeating it is harmless.
    Established,
    /// Read the parameters a frontend may change while connected, then write [`State::Reconfigured`].
    Reconfigure,
    /// Stop using the rings, write these states, then release what the rings held.
    Disconnect {
        /// States to write.
        then: &'static [State],
    },
    /// The peer is in a state it has no business in: as [`Action::Disconnect`], and write an error node.
    Fault {
        /// States to write.
        then: &'static [State],
    },
    /// As [`Action::Disconnect`], then forget the device.
    Remove {
        /// States to write; empty where our own node is gone, as writing would bring it back.
        then: &'static [State],
    },
}

/// The backend's end.
pub mod backend {
    use super::Action;
    use super::State::{self, *};

    /// What a backend in state `own` does when its frontend is in state `peer`.
    ///
    /// `own` is the state this backend last wrote, or `Unknown` when its directory is gone. `online` is the toolstack's node
    /// of this name: without it a closed device does not come back. `hotplug_connected` holds when `hotplug-status` reads
    /// "connected", or where no hotplug script is expected.
    ///
    /// A closed backend waits for its frontend to pass through `Initialising`: a frontend that was cut off while
    /// `Connected` does not get back in by staying there.
    pub fn on_frontend(own: State, peer: State, online: bool, hotplug_connected: bool) -> Action {
        if own == Unknown {
            return Action::Remove { then: &[] };
        }
        match peer {
            Initialising if !online && matches!(own, Closing | Closed) => {
                Action::Remove { then: to_closed(own) }
            }
            Initialising => close_or_switch(own, to_init_wait(own)),
            Closing => close_or_switch(own, to_closing(own)),
            Closed if online => close_or_switch(own, to_closed(own)),
            Closed | Unknown => Action::Remove { then: to_closed(own) },
            Connected | Initialised | Reconfiguring if own == Initialising => {
                Action::Switch(to_init_wait(own))
            }
            Connected => match own {
                InitWait if hotplug_connected => Action::Connect,
                Reconfigured => Action::Switch(&[Connected]),
                _ => Action::None,
            },
            Initialised => Action::None,
            Reconfiguring => match own {
                Connected | Reconfigured => Action::Reconfigure,
                _ => Action::None,
            },
            InitWait | Reconfigured => match own {
                Closing | Closed => Action::None,
                _ => Action::Fault { then: to_closing(own) },
            },
        }
    }

    /// The same edges, for a backend that ends the connection itself: towards `Closing`, where it waits for the frontend.
    pub fn on_fault(own: State) -> Action {
        match own {
            Unknown => Action::Remove { then: &[] },
            Closing | Closed => Action::None,
            _ => Action::Fault { then: to_closing(own) },
        }
    }

    fn close_or_switch(own: State, then: &'static [State]) -> Action {
        match own {
            _ if then.is_empty() => Action::None,
            Initialised | Connected | Reconfiguring | Reconfigured => Action::Disconnect { then },
            _ => Action::Switch(then),
        }
    }

    fn to_init_wait(own: State) -> &'static [State] {
        match own {
            InitWait | Unknown => &[],
            Initialising | Closed => &[InitWait],
            Closing => &[Closed, InitWait],
            Initialised | Connected | Reconfiguring | Reconfigured => &[Closing, Closed, InitWait],
        }
    }

    fn to_closing(own: State) -> &'static [State] {
        match own {
            Closing | Unknown => &[],
            Initialising => &[InitWait, Closing],
            _ => &[Closing],
        }
    }

    fn to_closed(own: State) -> &'static [State] {
        match own {
            Closed | Unknown => &[],
            Initialising | Closing => &[Closed],
            _ => &[Closing, Closed],
        }
    }
}

/// The frontend's end.
pub mod frontend {
    use super::Action;
    use super::State::{self, *};

    /// What a frontend in state `own` does when its backend is in state `peer`.
    ///
    /// `own` is the state this frontend last wrote, or `Unknown` when its directory is gone. A closed frontend starts again
    /// as soon as its backend is ready for it; one that does not want that (a device being removed, a back-off after a
    /// fault) does not ask yet. A connected frontend stays so while a backend of the same domain starts over: that backend
    /// finds the rings where they were published.
    pub fn on_backend(own: State, peer: State) -> Action {
        match (own, peer) {
            (Unknown, _) => Action::Remove { then: &[] },

            (Initialising, InitWait) => Action::Connect,
            (Closed, Initialising | InitWait) => Action::Switch(&[Initialising]),
            (Connected, Connected | Reconfigured) => Action::Established,
            (Reconfiguring, Reconfigured) => Action::Switch(&[Connected]),

            (Initialising, Closed | Unknown) | (Closed, _) => Action::None,
            (Initialising | Closing, Closing | Closed | Unknown) => Action::Switch(&[Closed]),
            (_, Closing | Closed | Unknown) => Action::Disconnect { then: &[Closed] },

            _ => Action::None,
        }
    }

    /// The same edges, for a frontend that ends the connection itself: to `Closing`, then as the backend follows.
    pub fn on_fault(own: State) -> Action {
        match own {
            Unknown => Action::Remove { then: &[] },
            Closing | Closed => Action::None,
            _ => Action::Fault { then: &[Closing] },
        }
    }

    /// A closed frontend that wants to start again while its backend waits in `Closed`. Backing off is the caller's.
    pub fn restart(own: State) -> Action {
        if own == Closed { Action::Switch(&[Initialising]) } else { Action::None }
    }
}

#[cfg(test)]
mod tests;
