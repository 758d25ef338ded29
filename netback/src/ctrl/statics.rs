//! Pages that the frontend lets us keep mapped, so that packets in them cost no grant operation (io/netif.h, "Static
//! Grants").

use alloc::sync::Arc;
use alloc::vec::Vec;

use grant::{MapOps, MapRequest, Mapper, Mapping};
use hypercall::{DomId, GrantRef, Hypervisor};

/// Pages kept per queue at most: one for each slot of both rings.
pub const STATIC_PAGES: usize = 512;

struct Page<H: Hypervisor> {
    gref: GrantRef,
    read_only: bool,
    /// `None` while the way is withdrawn: the frontend's word holds, and nothing of it is mapped.
    mapping: Option<Arc<Mapping<H>>>,
}

impl<H: Hypervisor> Page<H> {
    fn is_held(&self) -> bool {
        self.mapping.as_ref().is_some_and(|mapping| Arc::strong_count(mapping) > 1)
    }

    /// The mapping, if there is one and nobody holds it.
    fn take(&mut self) -> Option<Mapping<H>> {
        match Arc::try_unwrap(self.mapping.take()?) {
            Ok(mapping) => Some(mapping),
            Err(held) => {
                self.mapping = Some(held);
                None
            }
        }
    }
}

/// A page to be kept.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Wanted {
    pub(super) gref: GrantRef,
    pub(super) read_only: bool,
}

/// A page cannot be kept: not one of the list is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct NotKept;

/// What became of a page that is to be let go of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Removal {
    /// It is no longer ours.
    Removed,
    /// We never had it.
    Unknown,
    /// Somebody is using it.
    InUse,
}

/// The pages of one queue, in the order of their references: found by halving, since a table that is hashed by numbers
/// of the peer's choosing can be made to collide.
pub(super) struct StaticPages<H: Hypervisor>(Vec<Page<H>>);

impl<H: Hypervisor> StaticPages<H> {
    pub(super) const fn new() -> Self {
        Self(Vec::new())
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    fn find(&self, gref: GrantRef) -> Result<usize, usize> {
        self.0.binary_search_by_key(&gref, |page| page.gref)
    }

    /// The page of a reference, if it is kept and may be written where that is asked for.
    pub(super) fn get(&self, gref: GrantRef, writable: bool) -> Option<&Arc<Mapping<H>>> {
        let page = self.0.get(self.find(gref).ok()?)?;
        page.mapping.as_ref().filter(|_| !writable || !page.read_only)
    }

    /// Maps all of a list in one hypercall, or none of it.
    pub(super) fn add(
        &mut self,
        domain: DomId,
        mut wanted: Vec<Wanted>,
        mapper: &Mapper<H>,
    ) -> Result<(), NotKept> {
        wanted.sort_unstable_by_key(|page| page.gref);
        let is_twice = wanted.windows(2).any(|two| matches!(two, [a, b] if a.gref == b.gref));
        let is_there = wanted.iter().any(|page| self.find(page.gref).is_ok());
        if is_twice || is_there || self.len().saturating_add(wanted.len()) > STATIC_PAGES {
            return Err(NotKept);
        }
        let request = |&Wanted { gref, read_only }: &_| MapRequest { domain, gref, read_only };
        let mut ops = MapOps::new(wanted.len());
        let mut mapped = Vec::with_capacity(wanted.len());
        let mut failed = false;
        mapper.map_batch(&mut ops, wanted.iter().map(request), |result| match result {
            Ok(mapping) => mapped.push(mapping),
            Err(error) => {
                log::debug!("netback: static page of {domain} not kept: {error}");
                failed = true;
            }
        });
        if failed {
            mapper.unmap_batch(&mut ops, mapped);
            return Err(NotKept);
        }
        let pages = wanted.into_iter().zip(mapped).map(|(Wanted { gref, read_only }, mapping)| {
            Page { gref, read_only, mapping: Some(Arc::new(mapping)) }
        });
        self.0.extend(pages);
        self.0.sort_unstable_by_key(|page| page.gref);
        Ok(())
    }

    /// Whether, and if not why not, a page could be let go of now.
    pub(super) fn removal(&self, gref: GrantRef) -> Removal {
        match self.find(gref).ok().and_then(|at| self.0.get(at)) {
            None => Removal::Unknown,
            Some(page) if page.is_held() => Removal::InUse,
            Some(_) => Removal::Removed,
        }
    }

    /// Takes out a page that nobody uses, if it is there; and answers its mapping, if it has one.
    pub(super) fn remove(&mut self, gref: GrantRef) -> Option<Option<Mapping<H>>> {
        if self.removal(gref) != Removal::Removed {
            return None;
        }
        let at = self.find(gref).ok()?;
        Some(self.0.remove(at).take())
    }

    /// Whether somebody holds one of the pages.
    pub(super) fn is_in_use(&self) -> bool {
        self.0.iter().any(Page::is_held)
    }

    /// All mappings that nobody holds. Those that are held end when their last holder lets go.
    pub(super) fn into_mappings(self) -> impl Iterator<Item = Mapping<H>> {
        self.0.into_iter().filter_map(|mut page| page.take())
    }

    /// Unmaps what nobody holds; [`map_again`](Self::map_again) undoes it.
    pub(super) fn unmap(&mut self, mapper: &Mapper<H>) {
        let leaving: Vec<_> = self.0.iter_mut().filter_map(Page::take).collect();
        if !leaving.is_empty() {
            mapper.unmap_batch(&mut MapOps::new(leaving.len()), leaving);
        }
    }

    /// Maps what was unmapped. Packets in pages that cannot be mapped are copied.
    pub(super) fn map_again(&mut self, domain: DomId, mapper: &Mapper<H>) {
        let mut pages: Vec<_> = self.0.iter_mut().filter(|page| page.mapping.is_none()).collect();
        if pages.is_empty() {
            return;
        }
        let request = |page: &&mut Page<H>| {
            let Page { gref, read_only, .. } = **page;
            MapRequest { domain, gref, read_only }
        };
        let requests: Vec<_> = pages.iter().map(request).collect();
        let mut places = pages.iter_mut();
        mapper.map_batch(&mut MapOps::new(requests.len()), requests, |result| {
            if let Some(page) = places.next() {
                page.mapping = result.ok().map(Arc::new);
            }
        });
    }
}
