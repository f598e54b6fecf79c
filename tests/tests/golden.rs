//! Archives of released formats: whole ones, as the programs of their time wrote them, lie under `testdata` and are restored
//! by the programs of today, wherever they lead.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use highwater_tests::PgVersion;
use highwater_tests::site::RestoreSite;

/// See `testdata/archive-v1/README.md`.
struct Golden {
    version: PgVersion,
    directory: &'static str,
    /// Behind row 200 and before row 201.
    moment: &'static str,
}

impl Golden {
    fn region(&self) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("testdata/archive-v1")
            .join(self.directory)
    }

    fn config(region: &Path) -> String {
        let region = region.display();
        format!("[cluster]\nname = \"orders\"\n[[region]]\nname = \"here\"\nurl = \"file://{region}\"\n")
    }
}

/// The rows of the ledger, as ranges.
const RANGES: &str = "SELECT string_agg(low || '-' || high, ' ' ORDER BY low) FROM (SELECT min(n) low, max(n) high FROM \
                      (SELECT n, n - row_number() OVER (ORDER BY n) AS run FROM ledger) rows GROUP BY run) runs";

async fn restored_everywhere(golden: Golden) -> Result<()> {
    // A copy: restores run under another account, and an archive belongs to nobody's checkout.
    let place = RestoreSite::with_config(golden.version, "")?;
    let region = place.dir().join("region");
    copy(&golden.region(), &region)?;
    std::fs::write(place.config_path(), Golden::config(&region))?;

    let verified = place.program()?.arg("verify").output().await?.expect_code(0)?;
    let listed = place.program()?.arg("list").output().await?.expect_code(0)?;
    ensure!(
        listed.stdout.contains("00000001-"),
        "{}\n{}",
        listed.said(),
        verified.said()
    );
    for (name, target, rows) in [
        ("latest", &["--to-latest"][..], "1-200 1001-1050"),
        ("first", &["--to-latest", "--timeline", "1"], "1-300"),
        ("name", &["--to-name", "two hundred", "--timeline", "1"], "1-200"),
        ("time", &["--to-time", golden.moment, "--timeline", "1"], "1-200"),
        ("backup", &["--to-immediate"], "1-100"),
    ] {
        let cluster = place.recovered(name, target).await?;
        let held = cluster.value(RANGES).await?;
        ensure!(held == rows, "{name}: rows {held}, not {rows}");
    }
    Ok(())
}

/// Directories and files, readable by everybody.
fn copy(from: &Path, to: &Path) -> Result<()> {
    std::fs::create_dir(to)?;
    for entry in std::fs::read_dir(from).with_context(|| from.display().to_string())? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy(&entry.path(), &target)?;
        } else {
            std::fs::write(target, std::fs::read(entry.path())?)?;
        }
    }
    Ok(())
}

#[tokio::test]
async fn i22_an_archive_of_the_first_format_is_restored_on_postgresql_14() -> Result<()> {
    restored_everywhere(Golden {
        version: PgVersion::V14,
        directory: "14",
        moment: "2026-11-22T20:03:12.144399Z",
    })
    .await
}

#[tokio::test]
async fn i22_an_archive_of_the_first_format_is_restored_on_postgresql_15() -> Result<()> {
    restored_everywhere(Golden {
        version: PgVersion::V15,
        directory: "15",
        moment: "2026-11-22T16:35:34.362669Z",
    })
    .await
}

#[tokio::test]
async fn i22_an_archive_of_the_first_format_is_restored_on_postgresql_16() -> Result<()> {
    restored_everywhere(Golden {
        version: PgVersion::V16,
        directory: "16",
        moment: "2026-11-22T20:03:35.829488Z",
    })
    .await
}

#[tokio::test]
async fn i22_an_archive_of_the_first_format_is_restored_on_postgresql_17() -> Result<()> {
    restored_everywhere(Golden {
        version: PgVersion::V17,
        directory: "17",
        moment: "2026-11-22T20:03:56.472401Z",
    })
    .await
}

#[tokio::test]
async fn i22_an_archive_of_the_first_format_is_restored_on_postgresql_18() -> Result<()> {
    restored_everywhere(Golden {
        version: PgVersion::V18,
        directory: "18",
        moment: "2026-11-22T16:36:05.934762Z",
    })
    .await
}
