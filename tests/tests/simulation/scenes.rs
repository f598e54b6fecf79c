//! Scenes that are played by the book instead of by chance.

use std::time::Duration;

use tokio::time::sleep;

use crate::region::Weather;
use crate::schedule::{Schedule, Theme, runtime};
use crate::wire::lsn;
use crate::world::Power;

/// The server is gone and uploads are on their way when the agent is told to stop: they are waited for.
#[test]
fn what_is_sealed_is_stored_when_the_agent_stops_without_a_server() {
    runtime().block_on(async {
        let mut scene = Schedule::new(Theme::Storage, 1);
        scene.sim.change(|world| world.write(50_000));
        scene.agent.start();
        sleep(Duration::from_secs(8)).await;
        let slow = Weather {
            delay: 3000,
            ..Weather::fair()
        };
        scene.regions.iter().for_each(|region| region.set(slow));
        scene.sim.change(|world| world.write(20_000));
        sleep(Duration::from_millis(10)).await;
        let sent = scene.sim.change(|world| {
            world.power = Power::Down;
            world.disconnect();
            world.sent[&world.node.line.version]
        });
        sleep(Duration::from_millis(300)).await;
        scene.agent.stop();
        while scene.agent.ended().await.is_none() {
            sleep(Duration::from_millis(100)).await;
        }
        let mut world = scene.sim.lock();
        let line = world.node.line.clone();
        assert_eq!(world.broken, None);
        assert!(world.statuses > 0);
        let held: Vec<_> = world.reaches(&line).into_iter().map(lsn).collect();
        assert_eq!(held, vec![lsn(sent); scene.regions.len()]);
    });
}
