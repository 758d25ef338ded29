//! What was measured, as tables, pictures and data.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};
use netback::datapath::Datapath;
use serde_json::{Value, json};

use crate::chart::{Bar, Panel, draw, figure};
use crate::costs::Costs;
use crate::duel::Class;
use crate::plan::{BATCHES, COSTS, Group, Measured, names};
use crate::series::{Series, Stats};
use crate::targets::Target;
use crate::testpmd;

fn mega(stats: Option<Stats>) -> String {
    stats.map_or_else(
        || "-".into(),
        |Stats { median, low, high, count }| {
            let [median, low, high] = [median, low, high].map(|rate| figure(rate / 1e6));
            format!("{median} ({low}-{high}, {count})")
        },
    )
}

fn print_group(group: &Group) {
    println!("\n{}", group.title);
    let reference = group.find(names::RING_H).or_else(|| group.find(names::DESCRIPTORS_C));
    println!(
        "{:<44} {:>28} {:>28} {:>7} {:>14} {:>22}",
        "",
        "near, M/s",
        "far, M/s",
        if group.size.is_some() { "GB/s" } else { "" },
        if reference.is_some() { "against ring.h" } else { "" },
        "one thread, ns"
    );
    for (series, alone) in group.series.iter().zip(&group.alone) {
        let gigabytes = group.size.and_then(|size| {
            series.main().map(|(_, stats)| figure(stats.median * size as f64 / 1e9))
        });
        let class = series.main().map(|(class, _)| class);
        let ratio = reference.filter(|peer| peer.name != series.name).zip(class);
        let ratio = ratio.and_then(|(peer, class)| series.ratio(&[peer], class));
        println!(
            "{:<44} {:>28} {:>28} {:>7} {:>14} {:>22}{}",
            series.name,
            mega(series.stats(Class::Near)),
            mega(series.stats(Class::Far)),
            gigabytes.unwrap_or_default(),
            ratio.map(|ratio| format!("{} x", figure(ratio.median))).unwrap_or_default(),
            alone.map_or("-".into(), |Stats { median, low, high, .. }| {
                format!("{} ({}-{})", figure(median), figure(low), figure(high))
            }),
            if series.is_disturbed() { "  disturbed" } else { "" }
        );
    }
    for remark in &group.remarks {
        println!("  {remark}");
    }
}

fn print_foreign(measured: &Measured) {
    println!("\nDPDK's testpmd, in processes of its own");
    let Some(version) = testpmd::version() else {
        println!("  not installed (Debian: dpdk-dev)");
        return;
    };
    println!("  {version}");
    for foreign in &measured.foreign {
        let what = format!("{}, {} bytes", foreign.link, foreign.size);
        match &foreign.outcome {
            Ok((class, rates)) => {
                let class = class.map_or("class changed", Class::name);
                println!("{what:<70} {} {class}", mega(Stats::of(rates.clone())));
            }
            Err(error) => println!("{what:<70} failed: {error}"),
        }
    }
}

/// The tables.
pub fn print(measured: &Measured, costs: &[Costs], targets: &[Target]) {
    println!("Medians, (middle half, samples).");
    for group in &measured.packets {
        print_group(group);
    }
    for (_, group) in &measured.descriptors {
        print_group(group);
    }
    print_foreign(measured);
    println!(
        "\n64 bytes from guest to backend, by batch and by what a hypercall costs beyond what it does, M/s"
    );
    print!("{:<30}", "");
    BATCHES.iter().for_each(|batch| print!("{:>12}", format!("batch {batch}")));
    println!();
    for path in [Datapath::Copy, Datapath::Static] {
        for cost in COSTS {
            print!("{:<30}", format!("{path}, hypercall {cost} ns"));
            for batch in BATCHES {
                let rate = of_batch(measured, path, batch, cost);
                print!("{:>12}", rate.map_or("-".into(), |stats| figure(stats.median / 1e6)));
            }
            println!();
        }
    }
    println!("\nPer 1,000 packets under load, the same on every machine");
    print!("{:<36}", "");
    let heads = [
        "copy hc", "map hc", "unmap hc", "copies", "maps", "unmaps", "notify>", "notify<",
        "index>", "index<", "copied/B",
    ];
    heads.iter().for_each(|head| print!("{head:>9}"));
    println!();
    for cost in costs {
        print!("{:<36}", cost.name());
        for (index, (_, value)) in cost.figures().into_iter().enumerate() {
            let value =
                if index == 10 { format!("{value:.2}") } else { format!("{:.1}", value * 1000.0) };
            print!("{value:>9}");
        }
        println!();
    }
    print_disturbance(measured);
    println!("\n{:<47} {:<31} {:>9}", "Targets", "against", "at least");
    targets.iter().for_each(|target| println!("{}", target.line()));
}

fn groups(measured: &Measured) -> impl Iterator<Item = &Group> {
    let descriptors = measured.descriptors.iter().map(|(_, group)| group);
    measured
        .packets
        .iter()
        .chain(descriptors)
        .chain(measured.batches.iter().map(|(.., group)| group))
}

fn print_disturbance(measured: &Measured) {
    let all = groups(measured).flat_map(|group| &group.series);
    let (taken, kept) =
        all.map(Series::counts).fold((0, 0), |sum, of| (sum.0 + of.0, sum.1 + of.1));
    let probes = Stats::of(measured.probes.clone());
    let (low, high) = probes.map_or((0.0, 0.0), |probes| (probes.low, probes.high));
    println!(
        "\n{kept} of {taken} samples count: in the others the class of the processors changed, or somebody else was at them. \
         A line goes from one to the other in {} to {} ns (the middle half of {} probes).",
        figure(low),
        figure(high),
        measured.probes.len()
    );
    if groups(measured).flat_map(|group| &group.series).any(Series::is_disturbed) {
        println!(
            "The machine was not quiet: of the series marked as disturbed the least disturbed samples were taken, and their \
             figures mean little."
        );
    }
}

fn of_batch(measured: &Measured, path: Datapath, batch: usize, cost: u64) -> Option<Stats> {
    let found = measured.batches.iter().find(|of| (of.0, of.1) == (batch, cost));
    found?.2.find(path.name())?.main().map(|(_, stats)| stats)
}

fn bar(name: impl Into<String>, stats: Stats, ours: bool) -> Bar {
    let [value, low, high] = [stats.median, stats.low, stats.high].map(|rate| rate / 1e6);
    Bar { name: name.into(), value, range: Some((low, high)), ours }
}

fn is_ours(name: &str) -> bool {
    name.starts_with("our ") || name.contains("guest")
}

/// Mpps by size and datapath, by batch and hypercall cost, and counts per packet.
fn pictures(measured: &Measured, costs: &[Costs]) -> [(&'static str, String); 4] {
    let all_bars = |group: &Group| {
        let each = group.series.iter();
        let each = each.filter_map(|of| Some(bar(&of.name, of.main()?.1, is_ours(&of.name))));
        each.collect()
    };
    let note = "Millions per second, medians and middle halves; two threads on two processors, one process; batch 32";
    let mut sizes: Vec<_> = Vec::new();
    for group in &measured.packets {
        let mut bars: Vec<_> = all_bars(group);
        for foreign in measured.foreign.iter().filter(|of| Some(of.size) == group.size) {
            let rates = foreign.outcome.as_ref().ok().map(|(_, rates)| rates.clone());
            let name = foreign.link.split(',').next().unwrap_or_default();
            let name = if foreign.link.contains("packed") {
                format!("{name}, packed")
            } else {
                name.into()
            };
            bars.extend(rates.and_then(Stats::of).map(|stats| bar(name, stats, false)));
        }
        sizes.push(Panel { title: group.title.clone(), bars });
    }
    let descriptors = measured.descriptors.iter();
    let descriptors = descriptors
        .map(|(batch, group)| Panel { title: format!("batch {batch}"), bars: all_bars(group) });
    let mut batches = Vec::new();
    for cost in COSTS {
        for path in [Datapath::Copy, Datapath::Static] {
            let bars = BATCHES.into_iter().filter_map(|batch| {
                Some(bar(format!("batch {batch}"), of_batch(measured, path, batch, cost)?, true))
            });
            let title = format!("{path}, {cost} ns a hypercall");
            batches.push(Panel { title, bars: bars.collect() });
        }
    }
    let mut counters = Vec::new();
    for index in 0..11 {
        let mut title = "";
        let mut bars = Vec::new();
        for cost in costs {
            if let Some((name, value)) = cost.figures().get(index).copied() {
                title = name;
                bars.push(Bar { name: cost.name(), value, range: None, ours: true });
            }
        }
        counters.push(Panel { title: title.to_owned(), bars });
    }
    [
        ("packets.svg", draw("Packets per second, by size and datapath", note, &sizes)),
        (
            "descriptors.svg",
            draw(
                "Descriptors: request and response",
                "Millions of rounds per second",
                &descriptors.collect::<Vec<_>>(),
            ),
        ),
        (
            "batches.svg",
            draw(
                "64 bytes from guest to backend, by batch and hypercall cost",
                "Millions per second",
                &batches,
            ),
        ),
        (
            "counters.svg",
            draw(
                "What a packet costs under load",
                "Counts per packet, the same on every machine",
                &counters,
            ),
        ),
    ]
}

fn data(measured: &Measured, costs: &[Costs], targets: &[Target]) -> Value {
    let group = |group: &Group| {
        let series: Vec<_> = group.series.iter().map(Series::json).collect();
        let alone: Vec<_> = group.alone.iter().map(|of| of.map(|of| of.json())).collect();
        json!({ "title": group.title, "bytes": group.size, "series": series, "one_thread_ns": alone, "remarks": group.remarks })
    };
    let foreign = measured.foreign.iter().map(|foreign| match &foreign.outcome {
        Ok((class, rates)) => json!({
            "link": foreign.link, "bytes": foreign.size, "class": class.map(Class::name), "rates": rates,
        }),
        Err(error) => json!({ "link": foreign.link, "bytes": foreign.size, "error": error }),
    });
    json!({
        "ring_h": cfg!(ring_h),
        "testpmd": testpmd::version(),
        "probes_ns": measured.probes,
        "groups": groups(measured).map(group).collect::<Vec<_>>(),
        "foreign": foreign.collect::<Vec<_>>(),
        "costs": costs.iter().map(Costs::json).collect::<Vec<_>>(),
        "targets": targets.iter().map(Target::json).collect::<Vec<_>>(),
    })
}

/// Leaves pictures and data in a directory.
pub fn write(dir: &Path, measured: &Measured, costs: &[Costs], targets: &[Target]) -> Result<()> {
    let shown = || format!("cannot write to {}", dir.display());
    fs::create_dir_all(dir).with_context(shown)?;
    for (name, picture) in pictures(measured, costs) {
        fs::write(dir.join(name), picture).with_context(shown)?;
    }
    let data = serde_json::to_string_pretty(&data(measured, costs, targets))?;
    fs::write(dir.join("bench.json"), data).with_context(shown)
}
