//! Our ends of the ring against ends made of Xen's own macros (io/ring.h).
//!
//! The same random schedule runs on four rings: both ends in C, ours against C either way round, and both ours. After each
//! step all must have given the same answer (what was taken, whether to notify, whether work is left) and their pages must
//! be the same to the byte.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

mod common;

use core::sync::atomic::Ordering;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{BufRead, BufReader, Write as _};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::rc::Rc;
use std::sync::OnceLock;

use grant::SharedMemory;
use hypercall::GrantRef;
use netif::ring::{BackRing, FrontRing, Notify};
use netif::slot::{
    RxFlags, RxId, RxRequest, RxResponse, RxStatus, Slot, TxFlags, TxId, TxRequest, TxResponse,
    TxStatus,
};
use proptest::prelude::*;

/// A page in a file: the C program has the same file mapped.
#[derive(Clone, Debug)]
struct Page(Rc<File>);

impl Page {
    fn create(path: &Path) -> Self {
        std::fs::write(path, [0; 4096]).unwrap();
        Self(Rc::new(File::options().read(true).write(true).open(path).unwrap()))
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; 4096];
        self.0.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }
}

impl SharedMemory for Page {
    fn load_u32(&self, offset: usize, _: Ordering) -> u32 {
        let mut word = [0; 4];
        self.0.read_exact_at(&mut word, offset as u64).unwrap();
        u32::from_le_bytes(word)
    }
    fn store_u32(&self, offset: usize, value: u32, _: Ordering) {
        self.0.write_all_at(&value.to_le_bytes(), offset as u64).unwrap();
    }
    fn fence(&self) {}
    fn read_bytes(&self, _: usize, _: &mut [u8]) {}
    fn write_bytes(&self, _: usize, _: &[u8]) {}
}

/// A slot that both programs fill alike, by number.
trait Filled: Slot {
    fn fill(number: u32) -> Self;
    fn words(self) -> Vec<u32>;
}

impl Filled for TxRequest {
    fn fill(n: u32) -> Self {
        Self {
            gref: GrantRef(n * 3),
            offset: n as u16,
            flags: TxFlags::from_bits_retain((n >> 1) as u16),
            id: TxId((n + 7) as u16),
            size: (n * 5) as u16,
        }
    }
    fn words(self) -> Vec<u32> {
        self.encode().to_vec()
    }
}

impl Filled for TxResponse {
    fn fill(n: u32) -> Self {
        Self { id: TxId(n as u16), status: TxStatus(-((n % 3) as i16)) }
    }
    fn words(self) -> Vec<u32> {
        self.encode().to_vec()
    }
}

impl Filled for RxRequest {
    fn fill(n: u32) -> Self {
        Self { id: RxId(n as u16), gref: GrantRef(n * 3) }
    }
    fn words(self) -> Vec<u32> {
        self.encode().to_vec()
    }
}

impl Filled for RxResponse {
    fn fill(n: u32) -> Self {
        Self {
            id: RxId(n as u16),
            offset: (n * 3) as u16,
            flags: RxFlags::from_bits_retain((n >> 1) as u16),
            status: RxStatus(n as i16),
        }
    }
    fn words(self) -> Vec<u32> {
        self.encode().to_vec()
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum End {
    Front,
    Back,
}

#[derive(Clone, Copy, Debug)]
enum Verb {
    Init(u32),
    Push(u32),
    Publish,
    Take(u32),
    Arm,
}

/// One or both ends of a ring, asked by word.
trait Ends {
    fn ask(&mut self, end: End, verb: Verb) -> String;
}

struct Xen {
    program: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Xen {
    fn start(kind: &str, page: &Path) -> Self {
        static PROGRAM: OnceLock<std::path::PathBuf> = OnceLock::new();
        let program = PROGRAM.get_or_init(|| {
            let program = common::path("ring");
            common::compile("ring", include_str!("ring.c"), Some(&program), &[]);
            program
        });
        let mut program = Command::new(program)
            .arg(kind)
            .arg(page)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let input = program.stdin.take().unwrap();
        let output = BufReader::new(program.stdout.take().unwrap());
        Self { program, input, output }
    }
}

impl Ends for Xen {
    fn ask(&mut self, end: End, verb: Verb) -> String {
        let end = if end == End::Front { 'f' } else { 'b' };
        let (verb, number) = match verb {
            Verb::Init(start) => ("init", start),
            Verb::Push(count) => ("push", count),
            Verb::Publish => ("publish", 0),
            Verb::Take(count) => ("take", count),
            Verb::Arm => ("arm", 0),
        };
        writeln!(self.input, "{end} {verb} {number}").unwrap();
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        assert!(line.ends_with('\n'), "the C program ended");
        line.trim_end().to_string()
    }
}

impl Drop for Xen {
    fn drop(&mut self) {
        let _ = self.program.kill();
        let _ = self.program.wait();
    }
}

struct Ours<Req, Rsp> {
    page: Page,
    front: Option<FrontRing<Page, Req, Rsp>>,
    back: Option<BackRing<Page, Req, Rsp>>,
    pushed: u32,
    answered: u32,
}

impl<Req: Filled, Rsp: Filled> Ours<Req, Rsp> {
    fn on(page: Page) -> Self {
        Self { page, front: None, back: None, pushed: 0, answered: 0 }
    }
}

fn print(text: &mut String, slot: impl Filled) {
    for byte in slot.words().into_iter().flat_map(u32::to_le_bytes) {
        write!(text, "{byte:02x}").unwrap();
    }
    text.push(' ');
}

fn number(yes: bool) -> String {
    u8::from(yes).to_string()
}

impl<Req: Filled, Rsp: Filled> Ends for Ours<Req, Rsp> {
    fn ask(&mut self, end: End, verb: Verb) -> String {
        let mut text = String::new();
        match (end, verb) {
            (End::Front, Verb::Init(start)) => {
                self.front = Some(FrontRing::init_at(self.page.clone(), start));
            }
            (End::Back, Verb::Init(_)) => {
                self.back = Some(BackRing::attach(self.page.clone()).unwrap());
            }
            (End::Front, verb) => {
                let ring = self.front.as_mut().unwrap();
                match verb {
                    Verb::Push(mut count) => {
                        while count > 0 && ring.push(Req::fill(self.pushed)).is_ok() {
                            self.pushed += 1;
                            count -= 1;
                        }
                        text = count.to_string();
                    }
                    Verb::Publish => text = number(ring.publish() == Notify::Needed),
                    Verb::Take(count) => {
                        ring.poll().unwrap();
                        for (_, slot) in ring.responses().take(count as usize) {
                            print(&mut text, slot);
                        }
                    }
                    _ => text = number(ring.arm().unwrap()),
                }
            }
            (End::Back, verb) => {
                let ring = self.back.as_mut().unwrap();
                match verb {
                    Verb::Push(mut count) => {
                        while count > 0 && ring.push(Rsp::fill(self.answered)).is_ok() {
                            self.answered += 1;
                            count -= 1;
                        }
                        text = count.to_string();
                    }
                    Verb::Publish => text = number(ring.publish() == Notify::Needed),
                    Verb::Take(count) => {
                        ring.poll().unwrap();
                        for slot in ring.requests().take(count as usize) {
                            print(&mut text, slot);
                        }
                    }
                    _ => text = number(ring.arm().unwrap()),
                }
            }
        }
        text.trim_end().to_string()
    }
}

fn verb() -> impl Strategy<Value = (End, Verb)> {
    let count = prop_oneof![0_u32..5, 0_u32..300];
    let verb = prop_oneof![
        3 => count.clone().prop_map(Verb::Push),
        3 => Just(Verb::Publish),
        3 => count.prop_map(Verb::Take),
        2 => Just(Verb::Arm),
    ];
    (prop_oneof![Just(End::Front), Just(End::Back)], verb)
}

/// Runs one schedule. Each world is a page and who plays which end on it.
fn agree<Req: Filled, Rsp: Filled>(
    kind: &str,
    start: u32,
    schedule: &[(End, Verb)],
) -> Result<(), TestCaseError> {
    let names = ["C-C", "ours-C", "C-ours", "ours-ours"];
    let mut worlds = names.map(|name| {
        let path = common::path(&format!("{kind}-{name}"));
        let page = Page::create(&path);
        let ours = Ours::<Req, Rsp>::on(page.clone());
        let xen = (name != "ours-ours").then(|| Xen::start(kind, &path));
        (name, page, ours, xen)
    });
    let inits = [(End::Front, Verb::Init(start)), (End::Back, Verb::Init(0))];
    for &(end, verb) in inits.iter().chain(schedule) {
        let answers = worlds.each_mut().map(|(name, page, ours, xen)| {
            let (front, back) = name.split_once('-').unwrap();
            let player = if end == End::Front { front } else { back };
            let answer = match (player, xen) {
                ("C", Some(xen)) => xen.ask(end, verb),
                _ => ours.ask(end, verb),
            };
            (answer, page.bytes())
        });
        let (expected, bytes) = &answers[0];
        for (name, (answer, page)) in names.iter().zip(&answers) {
            prop_assert_eq!(answer, expected, "{} at {:?} {:?}", name, end, verb);
            let differs = page.iter().zip(bytes).position(|(ours, xens)| ours != xens);
            prop_assert_eq!(differs, None, "page of {} after {:?} {:?}", name, end, verb);
        }
    }
    Ok(())
}

fn start() -> impl Strategy<Value = u32> {
    prop_oneof![Just(0), Just(1_000), Just(3_u32.wrapping_neg()), any::<u32>()]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, max_shrink_iters: 40, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn tx_rings_agree(start in start(), schedule in prop::collection::vec(verb(), 1..120)) {
        agree::<TxRequest, TxResponse>("tx", start, &schedule)?;
    }

    #[test]
    fn rx_rings_agree(start in start(), schedule in prop::collection::vec(verb(), 1..120)) {
        agree::<RxRequest, RxResponse>("rx", start, &schedule)?;
    }
}
