//! A frontend played by hand: it writes into rings and store whatever a test wants.

use std::rc::Rc;
use std::sync::atomic::Ordering;

use evtchn::Channel;
use grant::{GrantedPage, SharedMemory};
use hypercall::{DomId, GrantRef};
use netif::ring::{RxFrontRing, TxFrontRing, layout};
use netif::slot::{RxId, RxRequest, TxFlags, TxId, TxRequest, TxResponse};
use sim::SimHv;
use xenbus::client::Change;

use super::{Guest, Machine, front};

/// A granted page of the guest's, shared with the test that looks into it.
#[derive(Clone)]
pub struct Page(pub Rc<GrantedPage<SimHv>>);

impl Page {
    pub fn gref(&self) -> GrantRef {
        self.0.gref()
    }
}

impl SharedMemory for Page {
    fn load_u32(&self, offset: usize, order: Ordering) -> u32 {
        self.0.page().load_u32(offset, order)
    }
    fn store_u32(&self, offset: usize, value: u32, order: Ordering) {
        self.0.page().store_u32(offset, value, order);
    }
    fn fence(&self) {
        self.0.page().fence();
    }
    fn read_bytes(&self, offset: usize, to: &mut [u8]) {
        self.0.page().read_bytes(offset, to);
    }
    fn write_bytes(&self, offset: usize, from: &[u8]) {
        self.0.page().write_bytes(offset, from);
    }
}

/// Both rings of one queue, its port, and a page to send from.
pub struct Raw {
    pub tx_page: Page,
    pub rx_page: Page,
    pub tx: TxFrontRing<Page>,
    pub rx: RxFrontRing<Page>,
    pub channel: Channel<SimHv>,
    pub data: Page,
    pub rx_data: Vec<Page>,
}

impl Guest {
    pub fn page(&self, read_only: bool) -> Page {
        self.page_for(DomId(0), read_only)
    }

    pub fn page_for(&self, domain: DomId, read_only: bool) -> Page {
        Page(Rc::new(self.table.share(domain, read_only).unwrap()))
    }

    /// Writes nodes of the guest's own.
    pub fn commit(&mut self, changes: impl IntoIterator<Item = Change>) {
        self.client.commit(changes);
    }
}

impl Raw {
    /// Rings that begin at `start`, and whose nodes are not written yet.
    pub fn new(guest: &Guest, start: u32) -> Self {
        let (tx_page, rx_page) = (guest.page(false), guest.page(false));
        Self {
            tx: TxFrontRing::init_at(tx_page.clone(), start),
            rx: RxFrontRing::init_at(rx_page.clone(), start),
            tx_page,
            rx_page,
            channel: guest.upcalls.binder().alloc_unbound(DomId(0)).unwrap(),
            data: guest.page(true),
            rx_data: Vec::new(),
        }
    }

    /// The keys by which the backend finds this queue.
    pub fn keys(&self) -> Vec<(&'static str, String)> {
        vec![
            ("tx-ring-ref", self.tx_page.gref().to_string()),
            ("rx-ring-ref", self.rx_page.gref().to_string()),
            ("event-channel", self.channel.port().to_string()),
            ("request-rx-copy", "1".into()),
            ("feature-rx-notify", "1".into()),
            ("feature-sg", "1".into()),
            ("feature-gso-tcpv4", "1".into()),
            ("feature-gso-tcpv6", "1".into()),
            ("feature-ipv6-csum-offload", "1".into()),
        ]
    }

    pub fn rewrite(&self, at: usize, value: u32) {
        self.tx_page.store_u32(at, value, Ordering::SeqCst);
    }

    pub fn push(&mut self, request: TxRequest) {
        self.tx.push(request).unwrap();
    }

    /// A request for bytes of `data`.
    pub fn request(&self, id: u16, offset: u16, size: u16, flags: TxFlags) -> TxRequest {
        TxRequest { gref: self.data.gref(), offset, flags, id: TxId(id), size }
    }

    pub fn push_plain(&mut self, id: u16, size: u16) {
        let request = self.request(id, 0, size, TxFlags::empty());
        self.push(request);
    }

    /// Shows the backend what was pushed, and wakes it.
    pub fn go(&mut self) {
        let _ = self.tx.publish();
        let _ = self.rx.publish();
        self.channel.notify().unwrap();
    }

    /// Posts pages of the guest's own.
    pub fn post(&mut self, guest: &Guest, count: usize) {
        for _ in 0..count {
            let page = guest.page(false);
            self.rx.push(RxRequest { id: RxId(self.rx.next_slot()), gref: page.gref() }).unwrap();
            self.rx_data.push(page);
        }
    }

    /// All responses there are.
    pub fn responses(&mut self) -> Vec<TxResponse> {
        self.tx.poll().unwrap();
        self.tx.responses().map(|(_, response)| response).collect()
    }

    /// `req_prod` as the page has it.
    pub fn published(&self) -> u32 {
        self.tx_page.load_u32(layout::REQ_PROD, Ordering::SeqCst)
    }
}

impl Machine {
    /// Writes a raw frontend's keys, its own `state` last.
    pub fn offer(&mut self, guest: usize, keys: &[(&str, String)], state: &str) {
        let dir = front(self.guests[guest].id);
        let changes: Vec<_> = keys
            .iter()
            .map(|(key, value)| Change::Write {
                path: format!("{dir}/{key}"),
                value: value.clone().into(),
            })
            .collect();
        self.guests[guest].commit(changes);
        self.guests[guest]
            .commit([Change::Write { path: format!("{dir}/state"), value: state.into() }]);
        self.settle();
    }

    pub fn set_state(&mut self, guest: usize, state: &str) {
        self.offer(guest, &[], state);
    }

    /// A guest with a raw frontend, connected.
    pub fn raw(&mut self) -> (usize, Raw) {
        self.raw_at(0)
    }

    pub fn raw_at(&mut self, start: u32) -> (usize, Raw) {
        let guest = self.bare_guest();
        let raw = Raw::new(&self.guests[guest], start);
        self.offer(guest, &raw.keys(), "4");
        assert!(self.is_connected(guest), "{:?}", self.notices);
        (guest, raw)
    }
}
