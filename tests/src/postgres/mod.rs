//! Real PostgreSQL clusters of the supported majors.

mod builder;
mod cluster;
mod sound;
mod version;

pub use builder::PgBuilder;
pub use cluster::{PgCluster, Row, Stop};
pub use version::{PgVersion, pgbench, target_dir};
