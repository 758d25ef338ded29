//! What faults and deaths are tried at: connect, traffic by every datapath, withdraw, restore, close.

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU64, Ordering};

use features::XenFeatures;
use hypercall::Handle;
use netback::datapath::Datapath;
use sim::{DomainConfig, Item, Ledger, PortState};
use two_guests::{Board, Config, GuestConfig, Lever, Place, Sizes, World};

pub const MS: u64 = two_guests::SECOND / 1000;
pub const PLACES: [Place; 3] = [Place::Guest(0), Place::Guest(1), Place::Outside];

/// Two guests and the outside. The first guest's pages are lent anew for each packet, so that what it sends to the second goes
/// by reference and what it sends to the card is mapped; those of the second stay mapped. Both send small ones, too, which are
/// copied. In which of the two ways each domain has its events is as the seed has it.
pub fn machine(seed: u64, board: Board, driver_domain: bool, first_index: u32) -> World {
    let mut config = Config { driver_domain, ..Config::small(seed).on(board) };
    let fifo = |domain: u32| seed >> (domain + 1) & 1 != 0;
    config.domain = DomainConfig { privileged: !driver_domain, fifo: fifo(0), ..config.domain };
    let buffers = |count| NonZeroUsize::new(count).unwrap();
    config.backend.small_buffers = buffers(64);
    config.backend.large_buffers = buffers(4);
    config.backend.max_queues = 1;
    config.nic.buffers = 16;
    config.backend.policy.settle = MS / 10;
    let mut world = World::new(config);
    for (number, static_grants) in [(1, false), (2, true)] {
        let frontend = netfront::Config {
            posted: 24,
            first_index,
            static_grants,
            ..netfront::Config::new(Handle(0))
        };
        let domain = DomainConfig { fifo: fifo(number), ..DomainConfig::guest() };
        world
            .add_guest(GuestConfig { frontend, max_frame: 9000, domain, ..GuestConfig::default() })
            .unwrap();
    }
    let [first, second, outside] = PLACES;
    for (from, to, bytes) in [
        (first, second, 64),
        (first, second, 6000),
        (first, outside, 5000),
        (second, first, 100),
        (second, first, 1500),
        (second, outside, 1500),
        (outside, first, 1500),
        (outside, second, 1500),
    ] {
        world.flow(from, to, Sizes::Fixed(bytes), 2);
    }
    world
}

/// What is taken away under traffic, and given back.
pub fn levers(board: Board) -> [Lever; 4] {
    let bits = match board {
        Board::Arm => XenFeatures::DIRECT_MAPPED,
        Board::Arm2014 => XenFeatures::GRANT_MAP_IDENTITY,
        Board::Server => XenFeatures::AUTO_TRANSLATED_PHYSMAP,
    };
    [
        Lever::Path(Datapath::Direct),
        Lever::Path(Datapath::Static),
        Lever::Path(Datapath::Map),
        Lever::Bits(bits),
    ]
}

/// Frames that came, at each place that lives.
pub fn came(world: &World) -> Vec<u64> {
    let hosts = world.guests().map(|guest| &guest.host).chain([world.outside()]);
    hosts.map(|host| host.frames.counts().came).collect()
}

/// What a ledger has that ends with a connection.
pub fn of_connections(ledger: &Ledger) -> (usize, usize, usize) {
    let count =
        |wanted: fn(&Item) -> bool| ledger.entries().filter(|(_, item)| wanted(item)).count();
    let mappings = count(|item| matches!(item, Item::Mapping { .. }));
    let grants = count(|item| matches!(item, Item::Grant { .. }));
    let ports = count(|item| match item {
        Item::Port { state: PortState::Virq(..), .. } => false,
        Item::Port { .. } => true,
        _ => false,
    });
    (mappings, grants, ports)
}

/// Does `work` for each number below `count`, on all processors. What fails is said with its number.
pub fn for_each(count: u64, work: impl Fn(u64) + Sync) {
    let next = AtomicU64::new(0);
    let threads = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
    std::thread::scope(|scope| {
        let one = || {
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= count {
                    return;
                }
                work(number);
            }
        };
        let all: Vec<_> = (0..threads).map(|_| scope.spawn(one)).collect();
        for thread in all {
            if let Err(panic) = thread.join() {
                std::panic::resume_unwind(panic);
            }
        }
    });
}
