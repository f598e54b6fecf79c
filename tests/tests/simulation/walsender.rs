//! One connection of the simulated server: logs in whoever comes, answers the replication commands, streams.
//!
//! Speaks the real protocol over a stream in memory, in the order that PostgreSQL was seen to use, including what it
//! does at the end of a timeline, at a shutdown, and where WAL is gone.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::node::{Line, SLOT};
use crate::wal::{PAGE, VERSION};
use crate::wire::{self, Status, lsn, text};
use crate::world::{Power, Sim, World};

/// PostgreSQL's largest WAL message.
const MOST: u64 = 16 * PAGE;
/// Bytes waiting to be written before the sender looks for more.
const AHEAD: usize = 64 * 1024;
/// Between the questions of a server that is shutting down; a real one leaves no pause at all.
const PRESSING: Duration = Duration::from_millis(25);
/// Room on the way to a server that reads nothing: for a status message, and not for two.
const HARDLY_ANY: usize = 64;
/// Half of `wal_sender_timeout`.
const SILENCE: Duration = Duration::from_secs(30);

type Answer = Result<Vec<u8>, Vec<u8>>;

pub(crate) struct Sender {
    sim: Arc<Sim>,
    number: u64,
    input: tokio::io::ReadHalf<DuplexStream>,
    output: tokio::io::WriteHalf<DuplexStream>,
    received: Vec<u8>,
    pending: Vec<u8>,
}

/// Opens a connection, or refuses.
pub(crate) fn accept(sim: &Arc<Sim>) -> io::Result<DuplexStream> {
    let mut world = sim.lock();
    if world.power == Power::Down {
        return Err(io::ErrorKind::ConnectionRefused.into());
    }
    let room = match world.rng.pick(&[4_096, 65_536, 262_144]) {
        _ if world.deaf => HARDLY_ANY,
        room => room,
    };
    let (ours, theirs) = tokio::io::duplex(room);
    let number = world.next_connection;
    world.next_connection += 1;
    let killed = CancellationToken::new();
    world.connections.insert(number, killed.clone());
    let (input, output) = tokio::io::split(ours);
    let sender = Sender {
        sim: sim.clone(),
        number,
        input,
        output,
        received: Vec::new(),
        pending: Vec::new(),
    };
    tokio::spawn(async move {
        let sim = sender.sim.clone();
        // A connection that breaks is no event of its own.
        let _ = killed.run_until_cancelled(sender.serve()).await;
        sim.change(|world| world.close(number));
    });
    Ok(theirs)
}

impl World {
    fn close(&mut self, connection: u64) {
        self.connections.remove(&connection);
        self.release(connection);
    }

    fn release(&mut self, connection: u64) {
        if self.slot_holder == Some(connection) {
            self.slot_holder = None;
        }
    }

    fn leaves_unanswered(&mut self, command: &str) -> bool {
        let silent = self.unanswered.is_some_and(|begin| command.starts_with(begin));
        if silent {
            self.note(format!("no answer to {command}"));
        }
        silent
    }

    /// The answer to a command that is not a stream.
    fn answer(&mut self, command: &str) -> Answer {
        let words: Vec<&str> = command.split_whitespace().collect();
        match words[..] {
            ["IDENTIFY_SYSTEM"] => {
                let values = [
                    text(self.system_id),
                    text(self.node.line.timeline),
                    text(lsn(self.end())),
                    None,
                ];
                Ok(wire::rows(
                    &["systemid", "timeline", "xlogpos", "dbname"],
                    Some(&values),
                ))
            }
            ["SHOW", name] => Ok(wire::rows(&[name], Some(&[self.setting(name)]))),
            ["READ_REPLICATION_SLOT", _] => {
                let kind = self.node.slot.and(text("physical"));
                let at = self.node.slot.flatten().and_then(|at| text(lsn(at)));
                let timeline = at.as_ref().and(text(self.node.line.timeline));
                Ok(wire::rows(
                    &["slot_type", "restart_lsn", "restart_tli"],
                    Some(&[kind, at, timeline]),
                ))
            }
            ["CREATE_REPLICATION_SLOT", ..] if self.node.slot.is_some() => Err(wire::error(
                "ERROR",
                "42710",
                &format!("replication slot \"{SLOT}\" already exists"),
                "",
            )),
            ["CREATE_REPLICATION_SLOT", ..] => {
                self.node.create_slot();
                let from = self.node.checkpoint;
                self.slot_begins_at(from);
                self.note("slot created");
                let values = [text(SLOT), text("0/0"), None, None];
                Ok(wire::rows(
                    &["slot_name", "consistent_point", "snapshot_name", "output_plugin"],
                    Some(&values),
                ))
            }
            ["DROP_REPLICATION_SLOT", _] => {
                self.node.slot = None;
                self.note("slot dropped");
                Ok(wire::complete("DROP_REPLICATION_SLOT"))
            }
            ["TIMELINE_HISTORY", number] => self.history(number),
            _ => Err(wire::error(
                "ERROR",
                "0A000",
                &format!("not simulated: {command}"),
                "",
            )),
        }
    }

    fn setting(&self, name: &str) -> Option<Vec<u8>> {
        match name {
            "wal_segment_size" => text(format!("{}MB", self.segment() >> 20)),
            "wal_block_size" | "block_size" => text(PAGE),
            "server_version_num" => text(VERSION),
            "in_hot_standby" if self.standby => text("on"),
            _ => text("off"),
        }
    }

    fn history(&self, number: &str) -> Answer {
        let timeline: u32 = number.parse().unwrap_or(0);
        let known = self.node.line.part(timeline).and(self.histories.get(&timeline));
        let Some(content) = known else {
            return Err(wire::error("ERROR", "58P01", "could not open file", ""));
        };
        let values = [text(format!("{timeline:08X}.history")), Some(content.clone())];
        Ok(wire::rows(&["filename", "content"], Some(&values)))
    }
}

/// A stream that was asked for.
struct Asked {
    /// The line as far as the timeline that is streamed.
    line: Line,
    from: u64,
    /// The end of a timeline that the server has left.
    ends: Option<(u32, u64)>,
    /// Otherwise it only looks whether the WAL is there.
    with_slot: bool,
}

impl Sender {
    async fn serve(mut self) -> io::Result<()> {
        let length = self.input.read_u32().await? as usize;
        let mut startup = vec![0; length - 4];
        self.input.read_exact(&mut startup).await?;
        let stopping = self.sim.lock().power == Power::Stopping;
        if stopping {
            let refusal = wire::error("FATAL", "57P03", "the database system is shutting down", "");
            return self.output.write_all(&refusal).await;
        }
        self.output.write_all(&wire::welcome()).await?;
        loop {
            let (tag, body) = self.next().await?;
            if tag != b'Q' {
                return Ok(());
            }
            let command = String::from_utf8_lossy(&body[..body.len() - 1]).into_owned();
            if self.sim.lock().leaves_unanswered(&command) {
                loop {
                    self.next().await?;
                }
            }
            let answer = match command.strip_prefix("START_REPLICATION ") {
                Some(rest) => match self.start(rest) {
                    Ok(asked) => match self.stream(asked).await? {
                        Some(answer) => answer,
                        None => return Ok(()),
                    },
                    Err(error) => [error, wire::ready()].concat(),
                },
                None => {
                    let answer = self.sim.lock().answer(&command);
                    [answer.unwrap_or_else(|error| error), wire::ready()].concat()
                }
            };
            self.output.write_all(&answer).await?;
        }
    }

    /// The next message of the client.
    async fn next(&mut self) -> io::Result<(u8, Vec<u8>)> {
        loop {
            if let Some(message) = wire::take(&mut self.received) {
                return Ok(message);
            }
            read_more(&mut self.input, &mut self.received).await?;
        }
    }

    /// Checks what PostgreSQL checks before it agrees to stream. `rest` is `SLOT "s" PHYSICAL X/X TIMELINE n`, or the
    /// same without the slot.
    fn start(&mut self, rest: &str) -> Result<Asked, Vec<u8>> {
        let with_slot = rest.starts_with("SLOT");
        let words: Vec<&str> = rest.split_whitespace().collect();
        let [.., "PHYSICAL", from, "TIMELINE", timeline] = words[..] else {
            return Err(wire::error("ERROR", "42601", "syntax error", ""));
        };
        let (from, timeline) = (wire::parse_lsn(from).unwrap_or(0), timeline.parse().unwrap_or(0));
        let mut world = self.sim.lock();
        let end = world.end();
        let on = world.node.line.timeline;
        let (asked, at) = (lsn(from), lsn(end));
        world.note(format!(
            "asked to stream {asked} on {timeline}, server at {at} on {on}"
        ));
        let refuse = |code, text: String, detail: String| Err(wire::error("ERROR", code, &text, &detail));
        if with_slot && world.node.slot.is_none() {
            return refuse(
                "42704",
                format!("replication slot \"{SLOT}\" does not exist"),
                String::new(),
            );
        }
        if let Some(holder) = world.slot_holder.filter(|_| with_slot) {
            let text = format!("replication slot \"{SLOT}\" is active for PID {holder}");
            return refuse("55006", text, String::new());
        }
        let Some(line) = world.node.line.up_to(timeline) else {
            let text = format!("requested timeline {timeline} is not in this server's history");
            return refuse("XX000", text, String::new());
        };
        let ends = world.node.line.after(timeline);
        match ends {
            Some((_, switch)) if from > switch => {
                let text = format!(
                    "requested starting point {} on timeline {timeline} is not in this server's history",
                    lsn(from)
                );
                let fork = format!(
                    "This server's history forked from timeline {timeline} at {}.",
                    lsn(switch)
                );
                return refuse("XX000", text, fork);
            }
            None if from > end => {
                let text = format!(
                    "requested starting point {} is ahead of the WAL flush position of this server {}",
                    lsn(from),
                    lsn(end)
                );
                return refuse("XX000", text, String::new());
            }
            _ => {}
        }
        if with_slot {
            world.slot_holder = Some(self.number);
        }
        if with_slot && world.is_empty() {
            world.begins_at(from);
        }
        if with_slot {
            world.resumed(&line, from);
        }
        Ok(Asked {
            line,
            from,
            ends,
            with_slot,
        })
    }

    /// Streams until the timeline ends (the answer to that is returned) or the server has said good-bye.
    async fn stream(&mut self, asked: Asked) -> io::Result<Option<Vec<u8>>> {
        let Asked {
            line,
            from,
            ends,
            with_slot,
        } = asked;
        let number = self.number;
        let next = match ends {
            Some((next, switch)) if from == switch => Some((next, switch)),
            _ => {
                let hello = wire::message(b'W', &[0, 0, 0]);
                self.output.write_all(&hello).await?;
                let gone = self.sim.lock().node.kept_from > from;
                if gone {
                    let text = "requested WAL segment has already been removed";
                    let error = wire::error("ERROR", "58P01", text, "");
                    self.sim.change(|world| world.release(number));
                    return Ok(Some([error, wire::ready()].concat()));
                }
                self.copy(&line, from, with_slot).await?
            }
        };
        self.sim.change(|world| world.release(number));
        let Some((timeline, switch)) = next else {
            return Ok(None);
        };
        let values = [text(timeline), text(lsn(switch))];
        let rows = wire::rows(&["next_tli", "next_tli_startpos"], Some(&values));
        Ok(Some(
            [rows, wire::complete("START_REPLICATION"), wire::ready()].concat(),
        ))
    }

    /// The copy itself. Returns the next timeline, or none after a clean shutdown.
    async fn copy(&mut self, line: &Line, from: u64, with_slot: bool) -> io::Result<Option<(u32, u64)>> {
        let mut copy = Copy {
            line,
            with_slot,
            sent: from,
            flushed: 0,
            confirmed: 0,
            not_before: Instant::now(),
            asks: Instant::now() + SILENCE,
            finished: None,
        };
        let sim = self.sim.clone();
        let deaf = sim.lock().deaf;
        loop {
            // Counts from here on: what changes while the loop looks is not missed.
            let changed = sim.changed.notified();
            while let Some((tag, body)) = wire::take(&mut self.received) {
                match tag {
                    b'd' => copy.report(&self.sim, &body, &mut self.pending),
                    b'c' if copy.finished.is_some() => return Ok(copy.finished),
                    _ => return Err(io::ErrorKind::ConnectionReset.into()),
                }
            }
            if copy.is_done(&self.sim) {
                self.pending.extend(wire::complete("COPY 0"));
                self.output.write_all(&self.pending).await?;
                return Ok(None);
            }
            copy.fill(&self.sim, &mut self.pending);
            let wake = copy.wake(&self.sim, self.pending.is_empty());
            tokio::select! {
                biased;
                read = read_more(&mut self.input, &mut self.received), if !deaf => read?,
                written = self.output.write(&self.pending), if !self.pending.is_empty() => {
                    self.pending.drain(..written?);
                }
                () = changed => {}
                () = sleep_until(wake) => {}
            }
        }
    }
}

/// The state of one copy.
struct Copy<'a> {
    line: &'a Line,
    with_slot: bool,
    sent: u64,
    /// Last flush LSN that was not "no opinion".
    flushed: u64,
    /// What a shutdown waits for: flush, or write where flush is 0.
    confirmed: u64,
    not_before: Instant,
    /// When the receiver is asked for its position.
    asks: Instant,
    /// The timeline has ended: the next one, and where.
    finished: Option<(u32, u64)>,
}

impl Copy<'_> {
    fn report(&mut self, sim: &Sim, body: &[u8], pending: &mut Vec<u8>) {
        let Some(status) = wire::status(body) else {
            return;
        };
        let Status {
            write, flush, reply, ..
        } = status;
        let mut world = sim.lock();
        world.reported(self.line, status, self.sent, self.flushed);
        if flush > 0 {
            self.flushed = flush;
        }
        self.confirmed = if flush == 0 { write } else { flush };
        if reply {
            pending.extend(wire::keepalive(self.sent, world.micros(), false));
        }
        self.asks = self.asks.max(Instant::now() + PRESSING);
    }

    /// A shutdown is over when everything was sent and confirmed.
    fn is_done(&self, sim: &Sim) -> bool {
        let world = sim.lock();
        let current = world.node.line == *self.line;
        world.power == Power::Stopping && current && self.sent == world.end() && self.confirmed >= self.sent
    }

    fn is_pressing(&self, world: &World) -> bool {
        world.flood || world.power == Power::Stopping
    }

    /// Puts what is to be sent into `pending`, as long as that is not much.
    fn fill(&mut self, sim: &Sim, pending: &mut Vec<u8>) {
        let mut world = sim.lock();
        let now = Instant::now();
        while pending.len() < AHEAD && self.finished.is_none() && now >= self.not_before {
            let left = world.node.line.after(self.line.timeline);
            let same = world.node.line.up_to(self.line.timeline).as_ref() == Some(self.line);
            let end = match left {
                Some((_, switch)) => switch,
                None => world.end().min(world.sends_up_to),
            };
            if left.is_some() && self.sent >= end {
                pending.extend(wire::message(b'c', b""));
                self.finished = left;
                return;
            }
            if self.sent >= end || !same {
                break;
            }
            let most = world.rng.pick(&[97, PAGE, 5 * PAGE + 1000, MOST]);
            let to = (self.sent + most).min(end);
            let (micros, server_end) = (world.micros(), world.end());
            let data = world.served(self.line.version, self.sent, to);
            pending.extend(wire::wal(self.sent, server_end, micros, &data));
            self.sent = to;
            let sent = world.sent.entry(self.line.version).or_default();
            *sent = (*sent).max(to);
            if self.with_slot {
                let sent = world.sent_now.entry(self.line.version).or_default();
                *sent = (*sent).max(to);
            }
            if world.rng.chance(50) {
                self.not_before = now + world.rng.millis(0..400);
            }
        }
        if now >= self.asks && pending.is_empty() && self.finished.is_none() {
            pending.extend(wire::keepalive(self.sent, world.micros(), true));
            let pause = if self.is_pressing(&world) {
                PRESSING
            } else {
                SILENCE
            };
            self.asks = now + pause;
        }
    }

    /// When to look again without being woken. While something waits to be written nothing is asked.
    fn wake(&mut self, sim: &Sim, idle: bool) -> Instant {
        let now = Instant::now();
        if self.is_pressing(&sim.lock()) {
            self.asks = self.asks.min(now + PRESSING);
        }
        let asks = if idle && self.finished.is_none() {
            self.asks
        } else {
            now + SILENCE
        };
        match self.not_before > now {
            true => self.not_before.min(asks),
            false => asks,
        }
    }
}

async fn read_more(input: &mut (impl AsyncRead + Unpin), buffer: &mut Vec<u8>) -> io::Result<()> {
    match input.read_buf(buffer).await? {
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        _ => Ok(()),
    }
}
