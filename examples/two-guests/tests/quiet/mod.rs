//! The simulated Xen, each of whose calls goes by way of `inside`, a function of whoever measures: what happens in there is
//! not part of what is measured.

use std::num::NonZeroUsize;
use std::ptr::NonNull;

use hypercall::abi::{CacheFlush, GrantCopy, GrantMap, GrantUnmap};
use hypercall::{DomId, Errno, Gfn, GrantTableSize, Hypervisor, Port, VcpuId, Virq, Window};
use sim::SimHv;

use crate::inside;

/// The simulated Xen.
#[derive(Clone)]
pub struct Quiet(pub SimHv);

// SAFETY: it is the one within.
unsafe impl Hypervisor for Quiet {
    fn features(&self, submap: u32) -> Result<u32, Errno> {
        inside(|| self.0.features(submap))
    }

    fn notify(&self, port: Port) -> Result<(), Errno> {
        inside(|| self.0.notify(port))
    }

    fn alloc_unbound(&self, remote: DomId) -> Result<Port, Errno> {
        inside(|| self.0.alloc_unbound(remote))
    }

    fn bind_interdomain(&self, remote: DomId, remote_port: Port) -> Result<Port, Errno> {
        inside(|| self.0.bind_interdomain(remote, remote_port))
    }

    fn bind_virq(&self, virq: Virq, vcpu: VcpuId) -> Result<Port, Errno> {
        inside(|| self.0.bind_virq(virq, vcpu))
    }

    fn unmask(&self, port: Port) -> Result<(), Errno> {
        inside(|| self.0.unmask(port))
    }

    fn close(&self, port: Port) -> Result<(), Errno> {
        inside(|| self.0.close(port))
    }

    unsafe fn init_control(&self, vcpu: VcpuId, control: Gfn) -> Result<(), Errno> {
        // SAFETY: as the caller promises.
        inside(|| unsafe { self.0.init_control(vcpu, control) })
    }

    unsafe fn expand_array(&self, page: Gfn) -> Result<(), Errno> {
        // SAFETY: as the caller promises.
        inside(|| unsafe { self.0.expand_array(page) })
    }

    fn shared_info(&self) -> NonNull<u8> {
        inside(|| self.0.shared_info())
    }

    unsafe fn grant_copy(&self, ops: &mut [GrantCopy]) -> Result<(), Errno> {
        // SAFETY: as the caller promises.
        inside(|| unsafe { self.0.grant_copy(ops) })
    }

    unsafe fn grant_map(&self, ops: &mut [GrantMap]) -> Result<(), Errno> {
        // SAFETY: as the caller promises.
        inside(|| unsafe { self.0.grant_map(ops) })
    }

    unsafe fn grant_unmap(&self, ops: &mut [GrantUnmap]) -> Result<(), Errno> {
        // SAFETY: as the caller promises.
        inside(|| unsafe { self.0.grant_unmap(ops) })
    }

    fn cache_flush(&self, ops: &mut [CacheFlush]) -> Result<(), Errno> {
        inside(|| self.0.cache_flush(ops))
    }

    fn grant_table_size(&self) -> Result<GrantTableSize, Errno> {
        inside(|| self.0.grant_table_size())
    }

    fn grant_table_frame(&self, index: u32) -> Result<NonNull<u8>, Errno> {
        inside(|| self.0.grant_table_frame(index))
    }

    fn alloc_pages(&self, count: NonZeroUsize) -> Option<NonNull<u8>> {
        inside(|| self.0.alloc_pages(count))
    }

    unsafe fn free_pages(&self, pages: NonNull<u8>, count: NonZeroUsize) {
        // SAFETY: as the caller promises.
        inside(|| unsafe { self.0.free_pages(pages, count) });
    }

    fn virt_to_gfn(&self, page: NonNull<u8>) -> Gfn {
        inside(|| self.0.virt_to_gfn(page))
    }

    fn window(&self) -> Option<Window> {
        inside(|| self.0.window())
    }

    fn release_window(&self, window: Window) {
        inside(|| self.0.release_window(window));
    }

    fn mapped(&self, window: &Window) -> NonNull<u8> {
        inside(|| self.0.mapped(window))
    }
}
