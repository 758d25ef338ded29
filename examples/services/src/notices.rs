//! What becomes of vifs, in the log.

use netback::Notice;

/// Says it in a line.
pub fn tell(notice: &Notice) {
    match notice {
        Notice::Offered(vif) => log::info!("{vif}: offered"),
        Notice::Connected { vif, queues, features } => {
            log::info!("{vif}: connected queues={queues} features={features}");
        }
        Notice::Disconnected(vif) => log::info!("{vif}: disconnected"),
        Notice::Faulted(vif, fault) => log::error!("{vif}: closed: {fault}"),
        Notice::Refused(vif, refusal) => log::error!("{vif}: refused: {refusal}"),
        Notice::Removed(vif) => log::info!("{vif}: removed"),
        other => log::info!("{other:?}"),
    }
}
