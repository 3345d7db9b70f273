//! The policy: YAML text to checked types.

mod checked;
mod difference;
mod duration;
mod fleet;
mod prefix;
mod read;
mod region;
mod secret_url;
mod shown;

pub use checked::{
    Database, DocumentInForce, FromFleet, Listed, Mode, Model, OnRemoval, Policy, Rule, Source, Tls,
};
pub use difference::differences;
pub use duration::spelled;
pub use fleet::{Bounds, Document, Fleet, MAX_DOCUMENT, Rollout, check_host};
pub use prefix::{parse_cidr, without};
pub use read::{
    Problem, check_document, check_label, check_name, check_within, parse, parse_document,
    parse_fleet, with_rollout, with_rule, without_rollout, without_rule,
};
pub use region::{Dns, DnsType, Guards, Nameserver, Region, RegionSource, Select, Transport, Url};
pub use secret_url::{SecretUrl, redacted};
pub use shown::shown;
