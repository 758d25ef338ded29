//! The operator's key: a node of the store that dom0 alone may write and read. See [`services::withdrawal`].

use alloc::vec::Vec;

use hypercall::DomId;
use xenbus::client::{Change, Client};
use xenbus::wire::{Access, Perm};

/// The node.
const KEY: &str = "/local/domain/0/netback/withdrawn";
/// The directory it is in.
const HOME: &str = "/local/domain/0/netback";

/// Makes the node, empty.
pub(crate) fn create(client: &mut Client) {
    // Said of both: a new node would have its parent's permissions, but nobody has to know that to trust this.
    let perms = |path: &str| {
        let perms = Vec::from([Perm::new(Access::None, DomId(0))]);
        Change::SetPerms { path: path.into(), perms }
    };
    client.commit([
        Change::Mkdir { path: HOME.into() },
        perms(HOME),
        Change::Write { path: KEY.into(), value: Vec::new() },
        perms(KEY),
    ]);
}

#[cfg(test)]
mod tests {
    use xenbus::client::{Event, Outcome};
    use xenbus::server::{ConnId, Quotas, Server};

    use super::*;

    /// All events until nothing moves.
    fn converse(server: &mut Server, conn: ConnId, client: &mut Client) -> Vec<Event> {
        let mut events = Vec::new();
        for _ in 0..64 {
            let out = client.take_output();
            assert_eq!(server.receive(conn, &out).unwrap(), out.len());
            let answer = server.pending_output(conn).to_vec();
            client.receive(&answer).unwrap();
            server.consume_output(conn, answer.len());
            events.extend(core::iter::from_fn(|| client.poll_event()));
        }
        events
    }

    #[test]
    fn a_guest_can_neither_read_nor_write_it() {
        let mut server = Server::new(Quotas::default());
        let own = server.connect(DomId(0), true);
        let mut client = Client::new();
        create(&mut client);
        converse(&mut server, own, &mut client);
        let conn = server.connect(DomId(1), false);
        let mut guest = Client::new();
        let read = guest.read_many([KEY]);
        let write = guest.commit([Change::Write { path: KEY.into(), value: b"map".to_vec() }]);
        let mut refused = Vec::new();
        for event in converse(&mut server, conn, &mut guest) {
            let Event::Done { job, result } = event else { panic!("{event:?}") };
            // To a client, what it may not see is not there.
            let hidden = result == Ok(Outcome::Values([None].into()));
            assert!(result.is_err() || job == read && hidden, "{result:?}");
            refused.push(job);
        }
        assert_eq!(refused, [read, write]);
        client.read_many([KEY]);
        let events = converse(&mut server, own, &mut client);
        let Some(Event::Done { result: Ok(Outcome::Values(values)), .. }) = events.last() else {
            panic!("{events:?}");
        };
        assert_eq!(values.as_slice(), [Some(Vec::new())]);
    }
}
