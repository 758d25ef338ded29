//! What the toolstack orders this domain to do, by `control/shutdown` (docs/misc/xenstore-paths.pandoc of Xen).

use xenbus::client::{Change, Client, Error, Event, JobId, Outcome, WatchId};

const SHUTDOWN: &str = "control/shutdown";
/// An order that was acknowledged, so that the toolstack counts on it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Order {
    /// End.
    PowerOff,
    /// End, and be started again.
    Reboot,
    /// Call `SCHEDOP_shutdown` with `SHUTDOWN_suspend`.
    Suspend,
}

impl Order {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::PowerOff, Self::Reboot, Self::Suspend];

    /// What tells a toolstack that it may order this.
    const fn feature(self) -> &'static str {
        match self {
            Self::PowerOff => "control/feature-poweroff",
            Self::Reboot => "control/feature-reboot",
            Self::Suspend => "control/feature-suspend",
        }
    }

    fn parse(text: &[u8]) -> Option<Self> {
        match text {
            // As Linux takes it (`shutdown_handlers`).
            b"poweroff" | b"halt" => Some(Self::PowerOff),
            b"reboot" => Some(Self::Reboot),
            b"suspend" => Some(Self::Suspend),
            _ => None,
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Step {
    Idle,
    Look(JobId),
    /// Writing that we will do it.
    Accept(JobId, Order),
}

/// Hears orders.
#[derive(Debug)]
pub struct Control {
    watch: WatchId,
    /// What may be ordered.
    heard: &'static [Order],
    step: Step,
    /// Something changed since the last look began.
    dirty: bool,
    order: Option<Order>,
}

impl Control {
    /// Says that these orders are heard from now on. Others are not acknowledged, which to a toolstack is a refusal.
    #[must_use]
    pub fn new(client: &mut Client, heard: &'static [Order]) -> Self {
        let watch = client.watch(SHUTDOWN);
        let control = Self { watch, heard, step: Step::Idle, dirty: false, order: None };
        control.advertise(client);
        control
    }

    /// One commit each: a toolstack that lets us write one need not let us write the others.
    fn advertise(&self, client: &mut Client) {
        for order in self.heard {
            let path = order.feature().into();
            client.commit([Change::Write { path, value: b"1".to_vec() }]);
        }
    }

    /// Takes an event of the client, if it is about orders; says whether it was.
    pub fn on_store(&mut self, client: &mut Client, event: &Event) -> bool {
        match event {
            Event::Watch { watch, .. } if *watch == self.watch => self.dirty = true,
            Event::WatchFailed { watch, error } if *watch == self.watch => {
                log::error!("{SHUTDOWN}: cannot watch: {error}");
            }
            Event::Done { job, result } => match self.step {
                Step::Look(mine) if mine == *job => {
                    self.step = Step::Idle;
                    self.looked(client, result);
                }
                Step::Accept(mine, order) if mine == *job => {
                    self.step = Step::Idle;
                    self.accepted(order, result);
                }
                _ => return false,
            },
            _ => return false,
        }
        if self.dirty && self.step == Step::Idle {
            self.dirty = false;
            self.step = Step::Look(client.read_many([SHUTDOWN]));
        }
        true
    }

    fn looked(&mut self, client: &mut Client, result: &Result<Outcome, Error>) {
        match result {
            Ok(Outcome::Values(values)) => {
                // Empty: nothing is ordered, or what was is acknowledged.
                let Some(text) = values.first().and_then(Option::as_ref) else { return };
                let order = Order::parse(text).filter(|order| self.heard.contains(order));
                let Some(order) = order else {
                    if !text.is_empty() {
                        log::warn!("{SHUTDOWN}: ignored: {}", text.escape_ascii());
                    }
                    return;
                };
                // In one transaction, as Linux does: a toolstack that takes an order back knows whether it was too late.
                let path = || SHUTDOWN.into();
                let job = client.commit([
                    Change::Expect { path: path(), value: text.clone() },
                    Change::Write { path: path(), value: alloc::vec::Vec::new() },
                ]);
                self.step = Step::Accept(job, order);
            }
            Err(Error::Disconnected) => self.dirty = true,
            other => log::error!("{SHUTDOWN}: cannot read: {other:?}"),
        }
    }

    fn accepted(&mut self, order: Order, result: &Result<Outcome, Error>) {
        match result {
            Ok(_) => self.order = Some(order),
            // Taken back, or another by now; or whether it was written is not known.
            Err(Error::Unexpected { .. } | Error::Disconnected) => self.dirty = true,
            Err(error) => {
                log::error!("{SHUTDOWN}: cannot acknowledge: {error}");
            }
        }
    }

    /// The order that was acknowledged last, once.
    pub fn take_order(&mut self) -> Option<Order> {
        self.order.take()
    }

    /// The domain runs again, with a store that may know nothing of it; [`Client::reconnect`] was called.
    pub fn resumed(&mut self, client: &mut Client) {
        (self.step, self.dirty, self.order) = (Step::Idle, false, None);
        self.advertise(client);
    }
}

#[cfg(test)]
mod tests {
    use hypercall::DomId;
    use std::format;
    use std::string::String;
    use std::vec::Vec;
    use xenbus::server::{ConnId, Quotas, Server};
    use xenbus::wire::{Access, Perm};

    use super::*;

    const FEATURES: [&str; 3] =
        [Order::ALL[0].feature(), Order::ALL[1].feature(), Order::ALL[2].feature()];
    const HOME: &str = "/local/domain/1";

    struct World {
        server: Server,
        toolstack: (ConnId, Client),
        guest: (ConnId, Client),
        control: Control,
    }

    fn converse(server: &mut Server, (conn, client): &mut (ConnId, Client)) -> bool {
        let sent = server.receive(*conn, client.pending_output()).unwrap();
        client.consume_output(sent);
        let bytes = server.pending_output(*conn).to_vec();
        client.receive(&bytes).unwrap();
        server.consume_output(*conn, bytes.len());
        sent + bytes.len() > 0
    }

    impl World {
        fn new() -> Self {
            Self::hearing(&Order::ALL)
        }

        fn hearing(heard: &'static [Order]) -> Self {
            let mut server = Server::new(Quotas::default());
            let mut toolstack = (server.connect(DomId(0), true), Client::new());
            let mut guest = (server.introduce(DomId(1)), Client::new());
            // As libxl makes them: the guest may write these and no others.
            for (path, owner) in [("", 0), ("/control", 0), ("/control/shutdown", 1)]
                .into_iter()
                .chain(FEATURES.map(|path| (path.trim_start_matches("control"), 1)))
            {
                let path = match path.strip_prefix("/feature") {
                    Some(rest) => format!("{HOME}/control/feature{rest}"),
                    None => format!("{HOME}{path}"),
                };
                let perms = [(Access::None, owner), (Access::Read, 1 - owner)];
                let perms = perms.map(|(access, id)| Perm::new(access, DomId(id))).into();
                let write = Change::Write { path: path.clone(), value: Vec::new() };
                toolstack.1.commit([write, Change::SetPerms { path, perms }]);
            }
            while converse(&mut server, &mut toolstack) {}
            let control = Control::new(&mut guest.1, heard);
            let mut world = Self { server, toolstack, guest, control };
            world.settle();
            world
        }

        fn settle(&mut self) {
            while converse(&mut self.server, &mut self.toolstack)
                | converse(&mut self.server, &mut self.guest)
            {
                while let Some(event) = self.guest.1.poll_event() {
                    self.control.on_store(&mut self.guest.1, &event);
                }
            }
        }

        fn order(&mut self, value: &str) {
            let path = format!("{HOME}/{SHUTDOWN}");
            self.toolstack.1.commit([Change::Write { path, value: value.into() }]);
        }

        fn read(&mut self, path: &str) -> Option<String> {
            while self.toolstack.1.poll_event().is_some() {}
            self.toolstack.1.read_many([format!("{HOME}/{path}")]);
            while converse(&mut self.server, &mut self.toolstack) {}
            let Some(Event::Done { result: Ok(Outcome::Values(values)), .. }) =
                self.toolstack.1.poll_event()
            else {
                panic!("read");
            };
            values.into_iter().next()?.map(|value| String::from_utf8(value).unwrap())
        }
    }

    #[test]
    fn orders_are_acknowledged_and_given_out_once() {
        let mut world = World::new();
        for path in FEATURES {
            assert_eq!(world.read(path).as_deref(), Some("1"), "{path}");
        }
        assert_eq!(world.control.take_order(), None);
        for (text, order) in [
            ("poweroff", Order::PowerOff),
            ("halt", Order::PowerOff),
            ("reboot", Order::Reboot),
            ("suspend", Order::Suspend),
            ("suspend", Order::Suspend),
        ] {
            world.order(text);
            world.settle();
            assert_eq!(world.control.take_order(), Some(order));
            assert_eq!(world.control.take_order(), None);
            assert_eq!(world.read(SHUTDOWN).as_deref(), Some(""));
        }
    }

    #[test]
    fn what_is_no_order_is_left_alone() {
        let mut world = World::new();
        world.order("dance");
        world.settle();
        assert_eq!(world.control.take_order(), None);
        assert_eq!(world.read(SHUTDOWN).as_deref(), Some("dance"));
    }

    #[test]
    fn what_is_not_offered_is_refused() {
        let mut world = World::hearing(&[Order::PowerOff]);
        let offered = FEATURES.map(|path| world.read(path));
        assert_eq!(offered.each_ref().map(|one| one.as_deref()), [Some("1"), Some(""), Some("")]);
        world.order("suspend");
        world.settle();
        assert_eq!(world.control.take_order(), None);
        assert_eq!(world.read(SHUTDOWN).as_deref(), Some("suspend"), "not acknowledged");
        world.order("poweroff");
        world.settle();
        assert_eq!(world.control.take_order(), Some(Order::PowerOff));
    }

    #[test]
    fn an_order_that_is_taken_back_in_time_is_not_followed() {
        for instead in ["", "reboot"] {
            let mut world = World::new();
            world.order("suspend");
            converse(&mut world.server, &mut world.toolstack);
            // The guest reads it, and is about to acknowledge.
            while !matches!(world.control.step, Step::Accept(..)) {
                converse(&mut world.server, &mut world.guest);
                while let Some(event) = world.guest.1.poll_event() {
                    world.control.on_store(&mut world.guest.1, &event);
                }
            }
            world.order(instead);
            converse(&mut world.server, &mut world.toolstack);
            world.settle();
            let expected = (!instead.is_empty()).then_some(Order::Reboot);
            assert_eq!(world.control.take_order(), expected);
            assert_eq!(world.read(SHUTDOWN).as_deref(), Some(""));
        }
    }

    #[test]
    fn a_store_that_is_new_is_told_again() {
        let mut world = World::new();
        let rm = FEATURES
            .map(|path| Change::Write { path: format!("{HOME}/{path}"), value: Vec::new() });
        world.toolstack.1.commit(rm);
        world.settle();
        world.server.disconnect(world.guest.0);
        world.guest.0 = world.server.introduce(DomId(1));
        world.guest.1.reconnect();
        world.control.resumed(&mut world.guest.1);
        world.settle();
        assert_eq!(world.read(FEATURES[2]).as_deref(), Some("1"));
        world.order("suspend");
        world.settle();
        assert_eq!(world.control.take_order(), Some(Order::Suspend));
    }
}
