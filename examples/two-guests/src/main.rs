//! The main job in ten seconds: two guests, a backend, and features that come and go under traffic.

#[path = "demo/args.rs"]
mod args;
#[path = "demo/record.rs"]
mod record;
#[path = "demo/schedule.rs"]
mod schedule;
#[path = "demo/svg.rs"]
mod svg;
#[path = "demo/table.rs"]
mod table;

use std::fs;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use clap::Parser as _;
use two_guests::{Config, GuestConfig, Meter, Place, SECOND, Sizes, Tally, Tcp, World};

use args::Args;
use record::{INTERVAL, Record, Sample, per};
use table::Table;

const GUESTS: usize = 2;
/// Frames of a flow on their way at once.
const WINDOW: u64 = 16;
/// Nanoseconds that a round takes while no clock runs: before the start and after the end.
const TICK: u64 = 1_000_000;

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Two guests and the outside, each of which has streams and numbered frames from both others.
fn machine(args: &Args) -> Result<World> {
    let mut world =
        World::new(Config { seed: args.seed, tick: TICK, ..Config::default() }.on(args.board));
    for _ in 0..GUESTS {
        let guest = world.add_guest(GuestConfig::default());
        guest.map_err(|error| anyhow::anyhow!("no guest could be made: {error}"))?;
    }
    world.connect().context("the guests do not connect")?;
    let places = [Place::Guest(0), Place::Guest(1), Place::Outside];
    for from in places {
        for to in places.into_iter().filter(|to| *to != from) {
            world.flow(from, to, Sizes::Mixed(1514), WINDOW);
            world.stream(from, to);
        }
    }
    // Addresses are resolved and connections made before the clock starts.
    let begun = |world: &World| {
        let hosts = world.guests().map(|guest| &guest.host).chain([world.outside()]);
        hosts.filter_map(|host| host.tcp.as_ref()).all(Tcp::has_begun)
    };
    world.run_until(10 * SECOND, begun).context("the streams do not begin")?;
    if let (Some(misdeed), Some(guest)) = (args.sabotage, world.guest_mut(0)) {
        guest.host.sabotage(misdeed, args.seed);
    }
    Ok(world)
}

fn meters(world: &World) -> Vec<Meter> {
    (0..GUESTS).map(|guest| world.meter(guest).unwrap_or_default()).collect()
}

fn run(args: &Args) -> Result<ExitCode> {
    let mut schedule = schedule::schedule(args).into_iter().peekable();
    if let Some(late) = schedule.clone().find(|change| change.when > args.seconds) {
        bail!("{late} at {} s comes after the end, at {} s", late.when, args.seconds);
    }
    let mut world = machine(args)?;
    let names = world.guests().map(|guest| format!("vif{}.0", guest.id())).collect();
    let mut record = Record::new(names);
    let mut table = Table::new(&record, args.seconds, args.seed);
    let (start, offset) = (Instant::now(), world.now);
    let mut before = (0.0, meters(&world));
    loop {
        let elapsed = start.elapsed();
        let at = elapsed.as_secs_f64();
        while let Some(change) = schedule.next_if(|change| change.when <= at) {
            if change.restore {
                world.restore(change.lever);
            } else {
                world.withdraw(change.lever);
            }
            record.change(at, change);
            table.tell(&record);
        }
        let nanos = u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX);
        if !world.round(offset.after(nanos)) && world.is_idle() {
            // Everybody waits for some time to pass.
            std::thread::sleep(Duration::from_micros(50));
        }
        if at - before.0 >= INTERVAL {
            let now = meters(&world);
            let vifs = now.iter().zip(&before.1).map(|(now, before)| now.since(*before));
            record.sample(Sample { at, length: at - before.0, vifs: vifs.collect() });
            before = (at, now);
            table.show(&record);
        }
        if at >= args.seconds {
            break;
        }
    }
    table.end();
    let tally = world.finish();
    report(args, &world, &record, &tally)
}

fn write(path: &Path, text: &str) -> Result<()> {
    let write = || {
        if let Some(directory) = path.parent() {
            fs::create_dir_all(directory)?;
        }
        fs::write(path, text)
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

fn report(args: &Args, world: &World, record: &Record, tally: &Tally) -> Result<ExitCode> {
    let seconds = record.samples.last().map_or(1.0, |sample| sample.at);
    let mut gigabytes = 0.0;
    for (index, name) in record.names.iter().enumerate() {
        let sum = |of: fn(&Meter) -> u64| -> u64 {
            record.samples.iter().filter_map(|sample| sample.vifs.get(index)).map(of).sum()
        };
        let (bytes, packets) = (sum(Meter::total), sum(|meter| meter.packets));
        gigabytes += bytes as f64 / 1e9;
        println!(
            "{name}: {:.0} Mbit/s, {:.0} packets/s, {:.4} hypercalls and {:.4} notifications per packet",
            bytes as f64 * 8.0 / 1e6 / seconds,
            packets as f64 / seconds,
            per(sum(|meter| meter.hypercalls), packets),
            per(sum(|meter| meter.notifications), packets),
        );
    }
    println!(
        "{gigabytes:.1} GB in {seconds:.1} s; {} frames and blocks sent, {} came, all numbered and summed",
        tally.sent, tally.received
    );
    if !tally.is_clean() {
        println!("{}", world.drops());
    }
    for violation in world.sim.violations() {
        println!("against Xen's rules: {violation}");
    }
    let summary =
        format!("{seconds:.1} s, seed {}; {tally} switches {}", args.seed, record.switches);
    write(&args.svg, &svg::draw(record, &summary))?;
    println!("throughput over time: {}", args.svg.display());
    if let Some(path) = &args.json {
        let json = serde_json::to_string_pretty(&record.json(args.seed, tally))?;
        write(path, &format!("{json}\n"))?;
        println!("as data: {}", path.display());
    }
    let unmoved = record.withdrew_used && record.switches == 0;
    if unmoved {
        println!("a datapath was withdrawn while it was in use, and nothing changed");
    }
    println!("{tally} switches {}", record.switches);
    let good =
        tally.is_clean() && tally.received > 0 && !unmoved && world.sim.violations().is_empty();
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
