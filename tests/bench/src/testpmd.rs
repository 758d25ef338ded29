//! DPDK's own packet generator, where it is installed: two processes that poll, one on each processor.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

use crate::duel::Arena;

const PROGRAM: &str = "dpdk-testpmd";
/// How long the two may take to find each other.
const START: Duration = Duration::from_secs(20);

/// Two devices, of which one sends and the other receives.
#[derive(Clone, Copy, Debug)]
pub struct Link {
    pub name: &'static str,
    /// The device that the other connects to, and so comes first. `@` stands for the socket.
    server: &'static str,
    client: &'static str,
    client_sends: bool,
}

pub const LINKS: [Link; 3] = [
    Link {
        name: "virtio-user to vhost-user, split ring",
        server: "net_vhost0,iface=@,queues=1",
        client: "net_virtio_user0,path=@,queues=1",
        client_sends: true,
    },
    Link {
        name: "vhost-user to virtio-user, packed, in order, vectorised",
        server: "net_vhost0,iface=@,queues=1",
        client: "net_virtio_user0,path=@,queues=1,packed_vq=1,in_order=1,mrg_rxbuf=0,vectorized=1",
        client_sends: false,
    },
    Link {
        name: "memif",
        server: "net_memif0,role=server,socket=@,socket-abstract=no",
        client: "net_memif0,role=client,socket=@,socket-abstract=no",
        client_sends: true,
    },
];

/// The version, if it is there.
pub fn version() -> Option<String> {
    let output =
        Command::new(PROGRAM).args(["-v", "--no-huge", "--no-pci", "--help"]).output().ok()?;
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    let version = said.split(['\'', '\n']).find(|part| part.starts_with("DPDK "));
    Some(version.unwrap_or("DPDK of an unknown version").to_owned())
}

/// A process that ends with this value.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start(
    dir: &Path,
    name: &str,
    cpu: usize,
    device: &str,
    sends: bool,
    size: usize,
) -> Result<Running> {
    let device = device.replace('@', &dir.join("socket").display().to_string());
    let mut command = Command::new(PROGRAM);
    command.args(["--lcores", &format!("0@{cpu},1@{cpu}"), "--no-huge", "-m", "256", "--no-pci"]);
    command.arg(format!("--file-prefix=bench-{}-{name}", std::process::id()));
    command.args(["--force-max-simd-bitwidth=512", "--vdev", &device, "--"]);
    command.args(["--total-num-mbufs=8192", "--stats-period=1", "--no-lsc-interrupt"]);
    if sends {
        command.args(["--forward-mode=txonly", &format!("--txpkts={size}")]);
    } else {
        command.arg("--forward-mode=rxonly");
    }
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    Ok(Running(command.spawn().context("cannot start testpmd")?))
}

/// Received packets per second, by testpmd's own count, once a second: so many of them, when they flow.
pub fn measure(arena: &Arena, link: &Link, size: usize, seconds: usize) -> Result<Vec<f64>> {
    let dir = std::env::temp_dir().join(format!("bench-testpmd-{}", std::process::id()));
    std::fs::create_dir_all(&dir)?;
    let found = measure_in(&dir, arena, link, size, seconds);
    std::fs::remove_dir_all(&dir)?;
    found
}

fn measure_in(
    dir: &Path,
    arena: &Arena,
    link: &Link,
    size: usize,
    seconds: usize,
) -> Result<Vec<f64>> {
    let [first, second] = arena.processors;
    let mut server = start(dir, "server", first, link.server, !link.client_sends, size)?;
    let socket = dir.join("socket");
    let begin = Instant::now();
    while !socket.exists() && begin.elapsed() < START {
        thread::sleep(Duration::from_millis(50));
    }
    ensure!(socket.exists(), "testpmd has made no socket");
    let mut client = start(dir, "client", second, link.client, link.client_sends, size)?;
    let (receiver, other) =
        if link.client_sends { (&mut server, &mut client) } else { (&mut client, &mut server) };
    // What nobody reads must not stop the other.
    let other = other.0.stdout.take().context("no output")?;
    thread::spawn(move || BufReader::new(other).lines().map_while(Result::ok).for_each(drop));
    let output = receiver.0.stdout.take().context("no output")?;
    let (tell, told) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(output).lines().map_while(Result::ok) {
            let rate = line.trim().strip_prefix("Rx-pps:");
            let rate = rate.and_then(|rest| rest.split_whitespace().next()?.parse().ok());
            if rate.is_some_and(|rate: f64| tell.send(rate).is_err()) {
                break;
            }
        }
    });
    let mut rates = Vec::new();
    // The first second in which packets flow is not a whole one.
    while rates.len() <= seconds {
        ensure!(begin.elapsed() < START + Duration::from_secs(seconds as u64), "no packets came");
        match told.recv_timeout(Duration::from_millis(500)) {
            Ok(rate) if rate > 0.0 => rates.push(rate),
            Ok(_) | Err(mpsc::RecvTimeoutError::Timeout) => {}
            Err(mpsc::RecvTimeoutError::Disconnected) => anyhow::bail!("testpmd has ended"),
        }
    }
    Ok(rates.split_off(1))
}
