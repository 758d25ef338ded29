//! The operator's key: what netback is to do without, as a node of the store.

use alloc::string::String;

use hypercall::Hypervisor;
use netback::Backend;
use netback::datapath::Withdrawal;
use xenbus::client::{Client, Event, JobId, Outcome, WatchId};

/// The node, in our own directory. Its value is the whole of what is withdrawn, as words: datapaths, and numbers or names of
/// XENFEAT bits. Without the node nothing is withdrawn.
const KEY: &str = "netback/withdrawn";

/// The key, as it is watched. In a driver domain there is no such node until the operator writes it, from dom0: only the
/// toolstack may make nodes there, and no guest may look.
pub struct Key {
    /// Whose it is, in the log.
    of: &'static str,
    watch: WatchId,
    reading: Option<JobId>,
    /// It has changed again since the reading began.
    again: bool,
    /// What was heard last.
    value: String,
}

/// What a store event was, to the key.
#[derive(Debug, PartialEq, Eq)]
enum Heard {
    /// Somebody else's.
    Other,
    /// The key's, and nothing is to be done.
    Nothing,
    /// The key's new value, which is to be applied whole.
    Value(String),
}

impl Key {
    /// Watches the key; `of` is what the image calls itself in the log.
    #[must_use]
    pub fn new(client: &mut Client, of: &'static str) -> Self {
        let watch = client.watch(KEY);
        Self { of, watch, reading: None, again: false, value: String::new() }
    }

    /// Takes a store event, if it is the key's: what the key names is withdrawn, all else is given back. Says whether it was.
    pub fn on_store<H: Hypervisor>(
        &mut self,
        client: &mut Client,
        event: &Event,
        backend: &mut Backend<H>,
    ) -> bool {
        match self.take(client, event) {
            Heard::Other => false,
            Heard::Nothing => true,
            Heard::Value(value) => {
                let (withdrawal, unknown) = Withdrawal::parse(&value);
                for word in unknown {
                    let word = word.escape_debug();
                    log::warn!("{}: withdrawn: {word} is no datapath or feature", self.of);
                }
                log::info!("{}: withdrawn: {} {:?}", self.of, withdrawal.paths, withdrawal.bits);
                backend.set_withdrawn(&withdrawal);
                true
            }
        }
    }

    fn take(&mut self, client: &mut Client, event: &Event) -> Heard {
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
                log::error!("{}: {KEY} cannot be watched: {error}", self.of);
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
                        log::error!("{}: {KEY} cannot be read: {error}", self.of);
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
    use alloc::vec::Vec;

    use hypercall::DomId;
    use xenbus::client::Change;
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
            let key = Key::new(&mut client, "test");
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
                    if let Heard::Value(value) = self.key.take(&mut self.client, &event) {
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
        store.client.commit([Change::Rm { path: "netback".into() }]);
        assert_eq!(store.settle(), [""]);
    }
}
