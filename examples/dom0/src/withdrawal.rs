//! The operator's key: what netback is to do without, as a node of the store that dom0 alone may write and read.

use alloc::string::String;
use alloc::vec::Vec;

use hypercall::DomId;
use xenbus::client::{Change, Client, Event, JobId, Outcome, WatchId};
use xenbus::wire::{Access, Perm};

/// The node. Its value is the whole of what is withdrawn, as words: datapaths, and numbers or names of XENFEAT bits.
const KEY: &str = "/local/domain/0/netback/withdrawn";
/// The directory it is in.
const HOME: &str = "/local/domain/0/netback";

/// The key, as it is watched.
pub(crate) struct Key {
    watch: WatchId,
    reading: Option<JobId>,
    /// It has changed again since the reading began.
    again: bool,
    /// What was heard last.
    value: String,
}

/// What a store event was, to the key.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Heard {
    /// Somebody else's.
    Other,
    /// The key's, and nothing is to be done.
    Nothing,
    /// The key's new value, which is to be applied whole.
    Value(String),
}

impl Key {
    /// Makes the key, empty, and watches it.
    pub(crate) fn new(client: &mut Client) -> Self {
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
        Self { watch: client.watch(KEY), reading: None, again: false, value: String::new() }
    }

    /// Takes a store event.
    pub(crate) fn on_store(&mut self, client: &mut Client, event: &Event) -> Heard {
        match event {
            Event::Watch { watch, .. } if *watch == self.watch => {
                if self.reading.is_some() {
                    self.again = true;
                } else {
                    self.reading = Some(client.read_many([KEY]));
                }
                Heard::Nothing
            }
            Event::WatchFailed { watch, error } if *watch == self.watch => {
                log::error!("dom0: {KEY} cannot be watched: {error}");
                Heard::Nothing
            }
            Event::Done { job, result } if self.reading == Some(*job) => {
                let again = core::mem::take(&mut self.again);
                self.reading = again.then(|| client.read_many([KEY]));
                match result {
                    // A newer value is on its way.
                    _ if again => Heard::Nothing,
                    // Without the key nothing is withdrawn.
                    Ok(Outcome::Values(values)) => {
                        let value = values.first().and_then(Option::as_deref).unwrap_or_default();
                        self.hear(&String::from_utf8_lossy(value))
                    }
                    Ok(_) => Heard::Nothing,
                    Err(error) => {
                        log::error!("dom0: {KEY} cannot be read: {error}");
                        Heard::Nothing
                    }
                }
            }
            _ => Heard::Other,
        }
    }

    fn hear(&mut self, value: &str) -> Heard {
        if value == self.value {
            return Heard::Nothing;
        }
        self.value = value.into();
        Heard::Value(value.into())
    }
}

#[cfg(test)]
mod tests {
    use xenbus::server::{ConnId, Quotas, Server};

    use super::*;

    struct Store {
        server: Server,
        client: Client,
        own: ConnId,
        key: Key,
    }

    impl Store {
        fn new() -> Self {
            let mut server = Server::new(Quotas::default());
            let own = server.connect(DomId(0), true);
            let mut client = Client::new();
            let key = Key::new(&mut client);
            Self { server, client, own, key }
        }

        /// All values that are heard until nothing moves.
        fn settle(&mut self) -> Vec<String> {
            let mut heard = Vec::new();
            for _ in 0..64 {
                let out = self.client.take_output();
                let taken = self.server.receive(self.own, &out).unwrap();
                assert_eq!(taken, out.len());
                let answer = self.server.pending_output(self.own).to_vec();
                self.client.receive(&answer).unwrap();
                self.server.consume_output(self.own, answer.len());
                while let Some(event) = self.client.poll_event() {
                    if let Heard::Value(value) = self.key.on_store(&mut self.client, &event) {
                        heard.push(value);
                    }
                }
            }
            heard
        }

        fn write(&mut self, value: &str) {
            let value = value.as_bytes().to_vec();
            self.client.commit([Change::Write { path: KEY.into(), value }]);
        }
    }

    #[test]
    fn the_last_value_is_heard_of_each_change() {
        let mut store = Store::new();
        assert_eq!(store.settle(), Vec::<String>::new());
        store.write("map direct");
        assert_eq!(store.settle(), ["map direct"]);
        store.write("map");
        store.write("");
        assert_eq!(store.settle().last().map(String::as_str), Some(""));
        store.write("12");
        assert_eq!(store.settle(), ["12"]);
        store.write("12");
        assert_eq!(store.settle(), Vec::<String>::new());
        store.client.commit([Change::Rm { path: HOME.into() }]);
        assert_eq!(store.settle(), [""]);
    }

    #[test]
    fn a_guest_can_neither_read_nor_write_it() {
        let mut store = Store::new();
        store.settle();
        let guest = store.server.connect(DomId(1), false);
        let mut client = Client::new();
        let read = client.read_many([KEY]);
        let write = client.commit([Change::Write { path: KEY.into(), value: b"map".to_vec() }]);
        let mut refused = Vec::new();
        for _ in 0..8 {
            let out = client.take_output();
            store.server.receive(guest, &out).unwrap();
            let answer = store.server.pending_output(guest).to_vec();
            client.receive(&answer).unwrap();
            store.server.consume_output(guest, answer.len());
            while let Some(Event::Done { job, result }) = client.poll_event() {
                // To a client, what it may not see is not there.
                let hidden = result == Ok(Outcome::Values([None].into()));
                assert!(result.is_err() || job == read && hidden, "{result:?}");
                refused.push(job);
            }
        }
        assert_eq!(refused, [read, write]);
        assert_eq!(store.settle(), Vec::<String>::new());
    }
}
