//! QEMU's PC: Xen starts Linux as dom0, and that starts guests with xl.

use std::ffi::OsString;
use std::path::Path;
use std::process::Command;

use anyhow::Result;

use super::Plan;
use crate::console::Input;
use crate::images::XlImages;
use crate::packages;

/// A machine with Linux as dom0. Guests come later, by steps in dom0.
pub struct Board<'a> {
    /// Xen, dom0's kernel and its initramfs.
    pub images: &'a XlImages,
    /// Added to dom0's kernel arguments.
    pub dom0_arguments: &'a str,
}

/// Everything that dom0 and its guests use is unpacked into dom0's memory.
const DOM0_MEMORY: &str = "1280M";

impl Plan for Board<'_> {
    fn command(&self, _dir: &Path) -> Result<Command> {
        let mut command = Command::new(packages::qemu_x86_64()?);
        // Under Xen's own policy any domain may share memory with any other, as a driver domain has to.
        // With more features than these, Linux does not come up as dom0.
        //
        // dom0 stays on the first processor, and guests of type PVH keep away from it (`cpus` in their configuration):
        // whenever any processor of QEMU 7.2 loads its FPU state, `cpu_clear_ignne` writes the first one's `hflags2` back
        // without a lock, and with it an old word on whether a guest's page tables are in force. If that one is just entering or
        // leaving a guest, the guest dies of a triple fault.
        command
            .args(["-accel", "tcg,thread=multi", "-cpu", "qemu64,+svm,+npt"])
            .args(["-smp", "3", "-m", "4096", "-nic", "none"])
            .arg("-kernel")
            .arg(&self.images.xen)
            .arg("-append")
            .arg(format!(
                "console=com1 com1=115200,8n1 dom0_mem={DOM0_MEMORY},max:{DOM0_MEMORY} dom0_max_vcpus=1 dom0_vcpus_pin \
                 bootscrub=0 loglvl=all guest_loglvl=all noreboot xsm=dummy"
            ));
        let mut modules = OsString::from(&self.images.linux);
        modules.push(format!(" console=hvc0 rdinit=/init quiet {},", self.dom0_arguments));
        modules.push(&self.images.dom0);
        command.arg("-initrd").arg(modules);
        Ok(command)
    }

    fn input(&self) -> Input {
        Input::Relayed
    }
}
