//! A guest and the store: it sees only its own, and what it does to it hurts itself only.

use anyhow::{Result, ensure};

use super::life;
use crate::console::Source;
use crate::run::Run;

/// Privacy both ways, then guest 1 misbehaves while guest 2 streams, and last writes garbage into its ring.
/// Guest 1's store does not work any more afterwards.
pub fn all(run: &mut Run) {
    for (domain, other) in [(1, 2), (2, 1)] {
        let made = private(run, domain, other);
        run.check(
            &format!("guest {domain} cannot touch guest {other}'s nodes"),
            Source::Dom(domain),
            made,
        );
    }
    let made = untold(run);
    run.check("a request that dom0 is not told of is served", Source::Dom(1), made);
    let mut streaming = true;
    if let Err(error) = life::stream_start(run) {
        streaming = run.check("guest 2 streams from dom0", Source::Dom(2), Err(error));
    }
    for (what, name) in [
        ("nodes", "fills its quota of nodes"),
        ("watches", "floods watches"),
        ("transactions", "opens transactions without end"),
        ("values", "writes too long values and names"),
    ] {
        let made = refused(run, what);
        run.check(&format!("guest 1 {name} and is refused"), Source::Dom(1), made);
    }
    let made = flooded(run);
    run.check("guest 2's store answers while guest 1 floods it", Source::Dom(2), made);
    let made = garbage(run);
    run.check("garbage in guest 1's ring: guest 2's store answers", Source::Dom(2), made);
    if streaming {
        let made = life::stream_goes_on(run);
        run.check("guest 2's stream goes on through all that", Source::Dom(2), made);
        let _ = life::stream_stop(run);
    }
}

pub fn private(run: &Run, domain: usize, other: usize) -> Result<String> {
    let answer = run.good(domain, &format!("private {other}"), 60)?;
    let odd: Vec<_> = answer
        .lines
        .iter()
        .filter(|l| l.starts_with("ALLOWED") || l.starts_with("BROKEN"))
        .cloned()
        .collect();
    ensure!(odd.is_empty(), "{}", odd.join("; "));
    let count = |word: &str| answer.lines.iter().filter(|l| l.starts_with(word)).count();
    ensure!(count("refused") == 11 && count("works") == 3, "{}", answer.text());
    Ok(format!("{} tries refused, its own {} work", count("refused"), count("works")))
}

/// Linux moves its index and looks at the store's with no barrier in between, so it may not tell of a request.
fn untold(run: &Run) -> Result<String> {
    let answer = run.good(1, "untold", 20)?;
    let (sent, taken) = (answer.number("sent")?, answer.number("taken")?);
    ensure!(sent == taken, "of {sent} bytes in the ring {taken} are taken within two seconds");
    Ok(format!("{taken} bytes taken within two seconds"))
}

/// The store takes some and then refuses; anything else is no quota.
fn refused(run: &Run, what: &str) -> Result<String> {
    let answer = run.good(1, &format!("abuse {what}"), 89)?;
    let text = answer.text();
    ensure!(
        answer
            .lines
            .iter()
            .flat_map(|l| l.split(' '))
            .any(|w| !w.is_empty() && !w.starts_with("OK=")),
        "nothing is refused: {text}"
    );
    let seconds = answers(run)?;
    Ok(format!("{text}; five reads of guest 2 take {seconds:.2} s"))
}

fn answers(run: &Run) -> Result<f64> {
    let seconds = run.good(2, "storetime", 60)?.number("seconds")?;
    ensure!(seconds < 10.0, "five reads of guest 2 take {seconds} s");
    Ok(seconds)
}

fn flooded(run: &Run) -> Result<String> {
    let flood = run.begin(1, "abuse requests")?;
    let seconds = answers(run)?;
    let flood = run.end(flood, 60)?;
    Ok(format!("five reads take {seconds:.2} s, {} meanwhile", flood.text()))
}

fn garbage(run: &Run) -> Result<String> {
    run.good(1, "garbage", 60)?;
    let seconds = answers(run)?;
    let after = run.metrics(2, "garbage-after")?;
    let faults = after.need("xenstore_connection_faults_total", &[("domid", "1")])?;
    ensure!(faults > 0.0, "dom0 has not noticed the garbage");
    let others = after.get("xenstore_connection_faults_total", &[("domid", "2")]).unwrap_or(0.0);
    ensure!(others == 0.0, "guest 2 is blamed for {others} faults");
    Ok(format!("five reads take {seconds:.2} s, {faults} faults of guest 1 noticed"))
}
