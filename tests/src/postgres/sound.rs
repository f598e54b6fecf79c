//! Whether what a restored cluster holds is sound, as `pg_amcheck` looks at it: every heap and every B-tree of the database.

use anyhow::{Context, ensure};

use super::PgCluster;

/// Nobody waits for a commit here: a restored server may have the primary's list of synchronous standbys.
const TOOLS: &str = "SET synchronous_commit = local; CREATE EXTENSION IF NOT EXISTS amcheck";

/// Fails with the index. Every row must be found in its unique indexes.
const INDEXES: &str = "SELECT bt_index_check(i.indexrelid::regclass, i.indisunique) FROM pg_index i \
    JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_am am ON am.oid = c.relam \
    WHERE am.amname = 'btree' AND c.relkind = 'i' AND c.relpersistence = 'p' AND i.indisready AND i.indisvalid";

/// What is wrong in tables, TOAST tables and materialized views.
const TABLES: &str = "SELECT c.oid::regclass, v.blkno, v.offnum, v.msg FROM pg_class c \
    JOIN pg_am am ON am.oid = c.relam CROSS JOIN LATERAL verify_heapam(c.oid::regclass) v \
    WHERE am.amname = 'heap' AND c.relkind IN ('r', 't', 'm') AND c.relpersistence = 'p'";

impl PgCluster {
    /// Looks through the database `postgres` of a server that takes writes.
    ///
    /// # Errors
    /// When something in it is damaged.
    pub async fn is_sound(&self) -> anyhow::Result<()> {
        self.sql(TOOLS).await?;
        self.sql(INDEXES).await.context("an index is damaged")?;
        let damaged = self.sql(TABLES).await?;
        ensure!(damaged.is_empty(), "damaged tables: {damaged:?}");
        Ok(())
    }
}
