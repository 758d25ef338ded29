use alloc::collections::BTreeSet;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

use super::State::*;
use super::*;

/// An action as the tables below write it: a letter and the states.
fn short(action: Action) -> String {
    let (letter, states): (&str, &[State]) = match action {
        Action::None => (".", &[]),
        Action::Connect => ("C", &[]),
        Action::Established => ("E", &[]),
        Action::Reconfigure => ("R", &[]),
        Action::Switch(states) => ("s", states),
        Action::Disconnect { then } => ("d", then),
        Action::Fault { then } => ("f", then),
        Action::Remove { then } => ("r", then),
    };
    let mut out = String::from(letter);
    states.iter().for_each(|state| out.push_str(state.text()));
    out
}

/// Rows are our state, columns the peer's, both from 0 to 8.
type Table = [[&'static str; 9]; 9];

const BACKEND: Table = [
    ["r", "r", "r", "r", "r", "r", "r", "r", "r"],
    ["r6", "s2", "f25", "s2", "s2", "s25", "s6", "s2", "f25"],
    ["r56", ".", "f5", ".", "C", "s5", "s56", ".", "f5"],
    ["r56", "d562", "f5", ".", ".", "d5", "d56", ".", "f5"],
    ["r56", "d562", "f5", ".", ".", "d5", "d56", "R", "f5"],
    ["r6", "s62", ".", ".", ".", ".", "s6", ".", "."],
    ["r", "s2", ".", ".", ".", "s5", ".", ".", "."],
    ["r56", "d562", "f5", ".", ".", "d5", "d56", ".", "f5"],
    ["r56", "d562", "f5", ".", "s4", "d5", "d56", "R", "f5"],
];

const FRONTEND: Table = [
    ["r", "r", "r", "r", "r", "r", "r", "r", "r"],
    [".", ".", "C", ".", ".", "s6", ".", ".", "."],
    ["d6", ".", ".", ".", ".", "d6", "d6", ".", "."],
    ["d6", ".", ".", ".", ".", "d6", "d6", ".", "."],
    ["d6", ".", ".", ".", "E", "d6", "d6", ".", "E"],
    ["s6", ".", ".", ".", ".", "s6", "s6", ".", "."],
    [".", "s1", "s1", ".", ".", ".", ".", ".", "."],
    ["d6", ".", ".", ".", ".", "d6", "d6", ".", "s4"],
    ["d6", ".", ".", ".", ".", "d6", "d6", ".", "."],
];

fn every_pair() -> impl Iterator<Item = (State, State)> {
    State::ALL.into_iter().flat_map(|own| State::ALL.into_iter().map(move |peer| (own, peer)))
}

#[test]
fn backend_table() {
    for (own, peer) in every_pair() {
        let expected = BACKEND[own as usize][peer as usize];
        let action = |online, hotplug| short(backend::on_frontend(own, peer, online, hotplug));
        assert_eq!(action(true, true), expected, "{own:?} {peer:?}");
        let waiting = if expected == "C" { "." } else { expected };
        assert_eq!(action(true, false), waiting, "{own:?} {peer:?} without hotplug");
        let offline = match (own, peer) {
            (Unknown, _) => expected,
            // What would have stayed in Closed, or come back from it, goes.
            (_, Closed) => BACKEND[own as usize][0],
            (Closing, Initialising) => "r6",
            (Closed, Initialising) => "r",
            _ => expected,
        };
        assert_eq!(action(false, true), offline, "{own:?} {peer:?} offline");
    }
}

#[test]
fn frontend_table() {
    for (own, peer) in every_pair() {
        let expected = FRONTEND[own as usize][peer as usize];
        assert_eq!(short(frontend::on_backend(own, peer)), expected, "{own:?} {peer:?}");
    }
}

/// The states an action writes, when all goes well.
fn writes(action: Action) -> Vec<State> {
    match action {
        Action::None | Action::Established => vec![],
        Action::Connect => vec![Connected],
        Action::Reconfigure => vec![Reconfigured],
        Action::Switch(then)
        | Action::Disconnect { then }
        | Action::Fault { then }
        | Action::Remove { then } => then.to_vec(),
    }
}

#[test]
fn acting_twice_is_acting_once() {
    for (own, peer) in every_pair() {
        for (online, hotplug) in [(false, false), (false, true), (true, false), (true, true)] {
            let ask = |own| writes(backend::on_frontend(own, peer, online, hotplug));
            let mut now = own;
            for _ in 0..3 {
                now = ask(now).last().copied().unwrap_or(now);
            }
            assert_eq!(ask(now).last().copied().unwrap_or(now), now, "backend {own:?} {peer:?}");
        }
        let ask = |own| writes(frontend::on_backend(own, peer));
        let mut now = own;
        for _ in 0..3 {
            now = ask(now).last().copied().unwrap_or(now);
        }
        assert_eq!(ask(now).last().copied().unwrap_or(now), now, "frontend {own:?} {peer:?}");
    }
}

#[test]
fn a_fault_ends_in_closing_and_only_once() {
    for own in State::ALL {
        for fault in [backend::on_fault, frontend::on_fault] {
            match (own, fault(own)) {
                (Unknown, action) => assert_eq!(short(action), "r"),
                (Closing | Closed, action) => assert_eq!(action, Action::None),
                (_, Action::Fault { then }) => assert_eq!(then.last(), Some(&Closing)),
                (_, action) => panic!("{own:?}: {action:?}"),
            }
        }
    }
}

/// One end: the state others see, and the states it has decided to write but has not yet written.
type End = (State, Vec<State>);

fn steps(
    (own, queue): &End,
    peer: State,
    ask: impl Fn(State, State) -> Vec<Vec<State>>,
) -> Vec<End> {
    match queue.split_first() {
        Some((first, rest)) => vec![(*first, rest.to_vec())],
        None => ask(*own, peer).into_iter().map(|states| (*own, states)).collect(),
    }
}

fn moves((back, front): &(End, End)) -> Vec<(End, End)> {
    let backs =
        steps(back, front.0, |own, peer| vec![writes(backend::on_frontend(own, peer, true, true))]);
    let fronts = steps(front, back.0, |own, peer| {
        // A closed frontend may also choose to start over.
        vec![writes(frontend::on_backend(own, peer)), writes(frontend::restart(own))]
    });
    let backs = backs.into_iter().map(|next| (next, front.clone()));
    backs.chain(fronts.into_iter().map(|next| (back.clone(), next))).collect()
}

/// Each end sees the other late, or misses states: whatever happens, a connection can still be made.
#[test]
fn two_ends_always_find_each_other() {
    let mut seen = BTreeSet::new();
    let mut todo: Vec<(End, End)> = every_pair()
        .filter(|(back, _)| ![Unknown, Initialised, Reconfiguring].contains(back))
        .filter(|(_, front)| [Initialising, Connected, Closing, Closed].contains(front))
        .map(|(back, front)| ((back, vec![]), (front, vec![])))
        .collect();
    while let Some(at) = todo.pop() {
        if seen.insert(at.clone()) {
            todo.extend(moves(&at));
        }
    }
    assert!(seen.len() > 50);
    let mut good: BTreeSet<_> =
        seen.iter().filter(|(b, f)| b.0 == Connected && f.0 == Connected).cloned().collect();
    loop {
        let more: Vec<_> = seen
            .iter()
            .filter(|at| !good.contains(*at) && moves(at).iter().any(|next| good.contains(next)))
            .cloned()
            .collect();
        if more.is_empty() {
            break;
        }
        good.extend(more);
    }
    let stuck: Vec<_> = seen.difference(&good).collect();
    assert!(stuck.is_empty(), "{stuck:?}");
}

/// Windows' frontends close and reopen before they first connect, waiting for the backend at every edge.
#[test]
fn windows_cycle_at_start() {
    let mut own = InitWait;
    for (peer, goal) in
        [(Closing, Closing), (Closed, Closed), (Initialising, InitWait), (Connected, Connected)]
    {
        let states = writes(backend::on_frontend(own, peer, true, true));
        own = *states.last().unwrap();
        assert_eq!(own, goal);
    }
}

#[test]
fn a_frontend_that_was_cut_off_does_not_get_back_by_staying() {
    for own in [Closing, Closed] {
        for peer in [Connected, Initialised, Reconfiguring] {
            assert_eq!(backend::on_frontend(own, peer, true, true), Action::None);
        }
    }
}

#[test]
fn states_are_strict_decimal() {
    assert_eq!(State::parse(Some(b"4")), Connected);
    for state in State::ALL {
        assert_eq!(State::parse(Some(state.text().as_bytes())), state);
    }
    let bad: [&[u8]; 12] = [
        b"",
        b"9",
        b"10",
        b" 4",
        b"4 ",
        b"+4",
        b"-4",
        b"0x4",
        b"4\0",
        b"four",
        b"4294967300",
        b"00000000004",
    ];
    for value in bad {
        assert_eq!(State::parse(Some(value)), Unknown, "{value:?}");
    }
    assert_eq!(State::parse(None), Unknown);
}
