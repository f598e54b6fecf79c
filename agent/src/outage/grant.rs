//! Granting the wish to give the slot up: it is dropped and made anew.
//!
//! Owns: asking once more right before it is dropped, and telling everybody. Does not own: the moment. The caller knows
//! that nothing streams from the slot; one that somebody uses all the same cannot be dropped, and the wish stands.

use std::pin::pin;
use std::time::Duration;

use highwater_config::Standby;
use highwater_format::SystemId;
use highwater_pgwire::{ConnInfo, Connection};
use tokio::time::{Instant, sleep_until};

use super::GiveUp;
use crate::clock::Clock;
use crate::error::Result;
use crate::state::State;
use crate::{server, slot};

/// Between two attempts while something else goes on.
const PAUSE: Duration = Duration::from_secs(1);

/// What it takes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LettingGo<'a> {
    /// The wish.
    pub(crate) give_up: &'a GiveUp,
    /// The server.
    pub(crate) conninfo: &'a ConnInfo,
    /// The slot.
    pub(crate) slot: &'a str,
    /// Whose server it must be; none while nothing is known of the archive.
    pub(crate) system_id: Option<SystemId>,
    /// Whether it may be a standby's.
    pub(crate) standby: Standby,
    /// Where it is shown.
    pub(crate) state: &'a State,
    /// When it happened.
    pub(crate) clock: &'a Clock,
}

impl LettingGo<'_> {
    /// Makes the slot anew, so that the server may remove what it held, if that is asked for. The answer is why, if it was
    /// done: the cause of a gap that follows.
    pub(crate) async fn if_asked(&self) -> Result<Option<String>> {
        if self.give_up.asked().is_none() {
            return Ok(None);
        }
        let mut connection = server::connect(self.conninfo).await?;
        // The address may lead to another server by now.
        server::admit(&mut connection, self.system_id, self.standby).await?;
        let why = self.remake(&mut connection).await?;
        connection.close().await;
        Ok(why)
    }

    /// Grants the wish while `work` goes on, during which nothing streams. The work rests while the slot is made anew, because
    /// it makes one that is missing; where the slot cannot be given up it goes on. With what it gives comes why the slot was
    /// given up, if it was.
    pub(crate) async fn during<T>(&self, work: impl Future<Output = T>) -> (T, Option<String>) {
        let mut work = pin!(work);
        let (mut given_up, mut not_before) = (None, Instant::now());
        loop {
            let asked = async {
                sleep_until(not_before).await;
                self.give_up.when_asked().await;
            };
            tokio::select! {
                biased;
                done = &mut work => return (done, given_up),
                () = asked => {}
            }
            match self.if_asked().await {
                Ok(why) => given_up = why.or(given_up),
                Err(error) => {
                    tracing::warn!(%error, "the slot cannot be given up yet, trying again");
                    not_before = Instant::now() + PAUSE;
                }
            }
        }
    }

    async fn remake(&self, connection: &mut Connection) -> Result<Option<String>> {
        // The server may have been away for long, and the wish have been withdrawn since.
        let Some(why) = self.give_up.asked() else {
            return Ok(None);
        };
        let why = format!("the slot was given up by outage.policy: {why}");
        slot::remake(connection, self.conninfo, self.slot, &why).await?;
        tracing::error!(
            slot = self.slot,
            "GAVE UP THE SLOT: {why}. PostgreSQL may now remove WAL that no region has; where it does, the gap is recorded \
             and a new base backup taken as soon as storage is back"
        );
        let (at, reason) = (self.clock.now(), why.clone());
        self.state.update(|snapshot| snapshot.gave_up(at, reason));
        self.give_up.grant();
        Ok(Some(why))
    }
}
