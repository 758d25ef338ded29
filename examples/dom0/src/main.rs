//! A unikernel dom0.
#![cfg_attr(target_os = "none", no_std, no_main)]

use hypercall::{Hypervisor, Toolstack};
use runtime::{BootInfo, Hv};

runtime::entry!(run);

fn run(hv: Hv, boot: BootInfo) -> ! {
    log::info!("hello, {} bytes, {:?}", boot.memory, boot.bootargs);
    let _ = (hv.features(0), hv.domain_info(hypercall::DomId(0)));
    hv.shutdown(hypercall::Shutdown::PowerOff)
}
