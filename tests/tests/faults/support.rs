//! What the scenarios share.

use anyhow::{Context, Result, ensure};
use highwater_tests::clock::eventually;
use highwater_tests::ledger::{Expect, LedgerLog};
use highwater_tests::program::{Finished, Running};
use highwater_tests::site::{PATIENCE, REGIONS, RestoreSite, Site};
use highwater_tests::{PgVersion, S3Server, S3Snapshot, lsn};

pub(crate) const VERSION: PgVersion = PgVersion::V15;

/// Ends the agent in good order.
pub(crate) async fn leave(mut agent: Running) -> Result<String> {
    agent.terminate();
    let code = agent.wait_exit(PATIENCE).await?;
    ensure!(code == 0, "the agent left with {code}:\n{}", agent.last_words());
    Ok(agent.stderr())
}

/// Waits until both regions hold everything up to `position`.
pub(crate) async fn both_hold(site: &Site, position: u64) -> Result<()> {
    let hold = || async {
        site.stored_ends()
            .iter()
            .all(|end| *end >= position)
            .then_some(())
    };
    let waited = eventually("both regions to hold everything", PATIENCE, hold).await;
    waited.with_context(|| {
        format!(
            "{:?} of {}",
            site.stored_ends().map(lsn::show),
            lsn::show(position)
        )
    })
}

/// A place to restore from one region of the site.
pub(crate) fn from_region(site: &Site, index: usize) -> Result<RestoreSite> {
    RestoreSite::new(
        site.primary.version(),
        &[(REGIONS[index], site.regions[index].as_ref())],
    )
}

/// A restore from one region alone has all that was acknowledged.
pub(crate) async fn one_region_has_everything(site: &Site, index: usize, log: &LedgerLog) -> Result<()> {
    let place = from_region(site, index)?;
    let restored = place.recovered("data", &[]).await?;
    log.check(&restored, Expect::everything()).await?;
    Ok(())
}

/// A place to restore from both regions.
pub(crate) fn from_both(site: &Site) -> Result<RestoreSite> {
    let [north, south] = &site.regions;
    RestoreSite::new(
        site.primary.version(),
        &[(REGIONS[0], north.as_ref()), (REGIONS[1], south.as_ref())],
    )
}

/// Restores a frozen copy of one region and compares it with the notes.
pub(crate) async fn copy_holds(
    version: PgVersion,
    name: &str,
    copy: S3Snapshot,
    log: &LedgerLog,
    expect: Expect,
) -> Result<()> {
    let frozen = S3Server::serve(copy).await?;
    let place = RestoreSite::new(version, &[(name, &frozen)])?;
    let restored = place
        .recovered("data", &[])
        .await
        .with_context(|| format!("from {name}"))?;
    log.check(&restored, expect)
        .await
        .with_context(|| format!("from {name}"))?;
    Ok(())
}

/// Fails unless the program ended with `code` and named all of `words`, in any case.
pub(crate) fn answers(said: &Finished, code: i32, words: &[&str]) -> Result<()> {
    let text = said.said().to_lowercase();
    ensure!(
        said.code == code,
        "exit code {} instead of {code}:\n{text}",
        said.code
    );
    for word in words {
        ensure!(
            text.contains(&word.to_lowercase()),
            "{word:?} is not named:\n{text}"
        );
    }
    Ok(())
}

/// The ids of the base backups that are visible in one region.
pub(crate) fn backups(site: &Site, index: usize) -> Vec<String> {
    let keys = site.regions[index].objects(highwater_tests::site::BUCKET);
    let id = |key: &String| Some(key.strip_suffix("/backup.json")?.rsplit('/').next()?.to_owned());
    keys.iter().filter_map(id).collect()
}
