//! What the agent tells a monitoring system, in Prometheus' text format.
//!
//! Owns: the names, units and meaning of every series (`docs/metrics.md` lists them), rendered from one
//! [`Snapshot`]. Pure: nothing is registered anywhere, so every agent of a process has its own.
//! Does not own: where the numbers come from.

mod page;

use highwater_format::Lsn;

use self::page::{Page, Seconds, unix_seconds};
use crate::clock::Stamp;
use crate::lease::Moment;
use crate::state::{Connection, RegionState, RegionView, Snapshot};

/// The content type of [`render`]'s text.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// The text for one scrape.
pub fn render(snapshot: &Snapshot, now: Stamp) -> String {
    let mut page = Page::new();
    positions(&mut page, snapshot, now);
    regions(&mut page, snapshot);
    lineage(&mut page, snapshot);
    connection(&mut page, snapshot);
    resources(&mut page, snapshot);
    backup(&mut page, snapshot);
    gaps(&mut page, snapshot);
    slot(&mut page, snapshot);
    page.into_text()
}

fn positions(page: &mut Page, snapshot: &Snapshot, now: Stamp) {
    let timeline = snapshot.timeline.map_or(0, |timeline| timeline.get());
    page.gauge(
        "highwater_timeline",
        "Timeline that is being streamed; 0 before the first.",
        timeline,
    );
    page.gauge(
        "highwater_server_lsn",
        "The server's end of WAL as it last said, as a byte position.",
        snapshot.server_end.0,
    );
    page.gauge(
        "highwater_received_lsn",
        "End of the WAL received, as a byte position.",
        snapshot.received.0,
    );
    page.gauge(
        "highwater_sealed_lsn",
        "End of the WAL sealed into objects, as a byte position.",
        snapshot.sealed.0,
    );
    page.gauge(
        "highwater_durable_lsn",
        "The high-water mark: WAL before this byte position is in as many regions as the policy asks for.",
        snapshot.durable.0,
    );
    if let Some(lag) = snapshot.lag_of_durable() {
        page.gauge(
            "highwater_lag_bytes",
            "WAL that the server has and that is not durable.",
            lag,
        );
    }
    page.gauge(
        "highwater_lag_seconds",
        "Age of the last moment of which all is durable that the server had then; 0 when all that was received is.",
        Seconds(lag_seconds(snapshot, now.moment)),
    );
    if let Some(commit) = snapshot.durable_commit {
        let age = now.time.since(commit).as_secs_f64();
        page.gauge(
            "highwater_durable_commit_timestamp_seconds",
            "Time of the newest durable commit, by the server's clock.",
            Seconds(unix_seconds(commit)),
        );
        page.gauge(
            "highwater_durable_commit_age_seconds",
            "Age of the newest durable commit.",
            Seconds(age),
        );
    }
}

fn regions(page: &mut Page, snapshot: &Snapshot) {
    let all = &snapshot.regions;
    let lag = |view: &RegionView| snapshot.lag_of(view.timeline, view.stored);
    page.per_region(
        "highwater_region_stored_lsn",
        "gauge",
        "End of the region's gap-free WAL, as a byte position.",
        all,
        |view| view.stored.0.to_string(),
    );
    page.per_region(
        "highwater_region_lag_bytes",
        "gauge",
        "WAL that the server has and the region has not.",
        all.iter().filter(|view| lag(view).is_some()),
        |view| lag(view).unwrap_or_default().to_string(),
    );
    page.per_region(
        "highwater_region_up",
        "gauge",
        "1 when the region's last call succeeded.",
        all,
        |view| u8::from(matches!(view.state, RegionState::Ok | RegionState::CatchingUp)).to_string(),
    );
    page.per_region(
        "highwater_region_retries_total",
        "counter",
        "Calls that had to be repeated.",
        all,
        |view| view.retries.to_string(),
    );
    page.per_region(
        "highwater_region_objects_total",
        "counter",
        "Objects stored since the start.",
        all,
        |view| view.objects.to_string(),
    );
    page.per_region(
        "highwater_region_stored_bytes_total",
        "counter",
        "Bytes of the objects stored since the start.",
        all,
        |view| view.bytes.to_string(),
    );
    missing(page, all);
}

/// What comparing the regions found, and what was copied between them.
fn missing(page: &mut Page, all: &[RegionView]) {
    page.per_region(
        "highwater_region_missing_wal_bytes",
        "gauge",
        "WAL before the region's stored position that it lacks, as the last comparison found.",
        all,
        |view| view.lacks.wal_bytes.to_string(),
    );
    page.per_region(
        "highwater_region_damaged_wal_bytes",
        "gauge",
        "Of the missing WAL, what is damaged in every other region too: it cannot be filled in.",
        all,
        |view| view.lacks.damaged_bytes.to_string(),
    );
    page.per_region(
        "highwater_region_blocked",
        "gauge",
        "1 when the region cannot be filled beyond its stored position, because the WAL that follows is damaged or gone.",
        all,
        |view| u8::from(view.blocked.is_some()).to_string(),
    );
    page.per_region(
        "highwater_region_missing_backups",
        "gauge",
        "Base backups of other regions that are not complete here, as the last comparison found.",
        all,
        |view| view.lacks.backups.to_string(),
    );
    page.per_region(
        "highwater_region_lost",
        "gauge",
        "1 when objects are gone that the region had, until they are back.",
        all,
        |view| u8::from(view.lacks.lost).to_string(),
    );
    page.per_region(
        "highwater_region_healed_objects_total",
        "counter",
        "Objects copied from another region because they were missing here.",
        all,
        |view| view.healed_objects.to_string(),
    );
    page.per_region(
        "highwater_region_healed_bytes_total",
        "counter",
        "Bytes of the objects copied from another region.",
        all,
        |view| view.healed_bytes.to_string(),
    );
    page.per_region(
        "highwater_region_compared_timestamp_seconds",
        "gauge",
        "When the region was last compared with the others; 0 before the first time.",
        all,
        |view| {
            view.compared_at
                .map_or(Seconds(0.0), |time| Seconds(unix_seconds(time)))
                .to_string()
        },
    );
}

fn lineage(page: &mut Page, snapshot: &Snapshot) {
    page.gauge(
        "highwater_standby",
        "1 when the server is in recovery: this agent is a second stream beside the primary's.",
        u8::from(snapshot.standby),
    );
    page.gauge(
        "highwater_writer_epoch",
        "Epoch of this agent's claim on the archive; 0 while it has none.",
        snapshot.writer_epoch,
    );
    page.gauge(
        "highwater_synchronous_standby",
        "1 when synchronous_standby_names makes commits wait for this agent, whether that is meant or not.",
        u8::from(snapshot.synchronous.is_waited_for()),
    );
    page.gauge(
        "highwater_commits_held_back",
        "1 while no commit that waits for the agent returns, because a base backup has to end a gap first.",
        u8::from(snapshot.commits_held_back),
    );
    page.head(
        "highwater_divergent_wal_bytes",
        "gauge",
        "WAL in the archive that the newest timeline never had; by the timeline that it is on.",
    );
    for branch in &snapshot.branches {
        let timeline = branch.timeline.to_string();
        page.line(
            "highwater_divergent_wal_bytes",
            &[("timeline", &timeline)],
            branch.range().len(),
        );
    }
}

fn connection(page: &mut Page, snapshot: &Snapshot) {
    let current = connection_name(&snapshot.connection);
    page.head(
        "highwater_connection",
        "gauge",
        "1 for the state of the connection to PostgreSQL, 0 for the others.",
    );
    for name in [
        "starting",
        "streaming",
        "throttled",
        "reconnecting",
        "stopping",
        "stopped",
    ] {
        page.line(
            "highwater_connection",
            &[("state", name)],
            u8::from(name == current),
        );
    }
    page.head(
        "highwater_received_bytes_total",
        "counter",
        "WAL received since the start.",
    );
    page.line("highwater_received_bytes_total", &[], snapshot.received_bytes);
    page.gauge(
        "highwater_wal_damaged",
        "1 when the server sent a WAL record whose checksum is wrong.",
        u8::from(snapshot.wal_damage.is_some()),
    );
}

fn resources(page: &mut Page, snapshot: &Snapshot) {
    page.gauge(
        "highwater_memory_used_bytes",
        "WAL held in memory.",
        snapshot.memory_used,
    );
    page.gauge(
        "highwater_memory_limit_bytes",
        "Bound of the WAL held in memory.",
        snapshot.memory_limit,
    );
    if let Some(started) = snapshot.started_at {
        page.gauge(
            "highwater_start_timestamp_seconds",
            "Start of the agent.",
            Seconds(unix_seconds(started)),
        );
    }
    page.head(
        "highwater_build_info",
        "gauge",
        "Always 1; the version is a label.",
    );
    page.line(
        "highwater_build_info",
        &[("version", env!("CARGO_PKG_VERSION"))],
        1,
    );
}

fn backup(page: &mut Page, snapshot: &Snapshot) {
    let Some(last) = &snapshot.last_backup else { return };
    page.gauge(
        "highwater_backup_last_timestamp_seconds",
        "End of the newest base backup that succeeded; 0 when none did.",
        Seconds(last.id.as_ref().map_or(0.0, |_| unix_seconds(last.finished_at))),
    );
    page.gauge(
        "highwater_backup_last_success",
        "1 when the newest attempt at a base backup succeeded.",
        u8::from(last.error.is_none()),
    );
    page.gauge(
        "highwater_backup_last_bytes",
        "Plain size of the newest base backup.",
        last.bytes,
    );
}

fn slot(page: &mut Page, snapshot: &Snapshot) {
    page.head(
        "highwater_slot_given_up_total",
        "counter",
        "How often the outage policy gave the slot up.",
    );
    let times = snapshot.given_up.as_ref().map_or(0, |given_up| given_up.times);
    page.line("highwater_slot_given_up_total", &[], times);
    let Some(slot) = &snapshot.slot else { return };
    page.gauge(
        "highwater_slot_held_bytes",
        "WAL that the server keeps for the slot.",
        slot.held_bytes,
    );
    page.gauge(
        "highwater_slot_growth_bytes_per_second",
        "By how much the WAL kept for the slot grows; 0 while it does not.",
        slot.growth_bytes_per_second,
    );
    if let Some(room) = slot.room_bytes {
        page.gauge(
            "highwater_slot_room_bytes",
            "WAL that may still be written before the server gives the slot up or the disk is full.",
            room,
        );
    }
    if let Some(seconds) = slot.seconds_until_full {
        page.gauge(
            "highwater_slot_seconds_until_full",
            "When that room is used up at the present growth.",
            seconds,
        );
    }
}

fn gaps(page: &mut Page, snapshot: &Snapshot) {
    let Some(gaps) = &snapshot.gaps else { return };
    page.gauge(
        "highwater_gaps",
        "Gaps in the WAL that are on record.",
        gaps.recorded,
    );
    page.gauge(
        "highwater_gaps_open",
        "Gaps that no base backup has ended yet: nothing behind them can be restored.",
        gaps.open,
    );
    let Some(last) = &gaps.last else { return };
    page.gauge(
        "highwater_gap_last_timestamp_seconds",
        "When the newest gap was recorded.",
        Seconds(unix_seconds(last.recorded_at)),
    );
    page.gauge(
        "highwater_gap_last_bytes",
        "WAL that is missing in the newest gap.",
        last.range().len(),
    );
    let name = "highwater_gap_last_info";
    page.head(
        name,
        "gauge",
        "Which WAL the newest gap covers, and why; always 1.",
    );
    let (timeline, start) = (last.timeline.to_string(), last.start.to_string());
    let end = last.end.to_string();
    let labels = [
        ("timeline", timeline.as_str()),
        ("start", &start),
        ("end", &end),
        ("cause", &last.reason),
    ];
    page.line(name, &labels, 1);
}

/// The age, in seconds, of the last moment of which all is durable that the server had then; 0 when all that was received is.
/// The wall clock has no part in it: one that is set back by hours would hide for as long that WAL waits.
pub(crate) fn lag_seconds(snapshot: &Snapshot, now: Moment) -> f64 {
    if snapshot.received == Lsn::ZERO || snapshot.is_all_durable() {
        return 0.0;
    }
    let current = snapshot.current_at.map(|at| at.moment);
    current
        .or(snapshot.begun)
        .map_or(0.0, |since| now.since(since).as_secs_f64())
}

/// The connection's state as one lower-case word.
pub fn connection_name(connection: &Connection) -> &'static str {
    match connection {
        Connection::Starting => "starting",
        Connection::Streaming => "streaming",
        Connection::Throttled => "throttled",
        Connection::Reconnecting(_) => "reconnecting",
        Connection::Stopping => "stopping",
        Connection::Stopped(_) => "stopped",
    }
}

#[cfg(test)]
#[path = "metrics_tests.rs"]
mod tests;
