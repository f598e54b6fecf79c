//! Who answers at `admin.listen`: this cluster's agent, another one's, or something else.
//!
//! Owns: reading `/status` of whatever listens there, and telling whose it is. Clusters on one machine share the default
//! port, so nothing of an answer counts before it has said whose it is. Does not own: the routes ([`crate::admin`]), nor
//! what is made of the answer.

use std::net::SocketAddr;

use highwater_format::{ClusterName, SystemId};
use serde_json::Value;

use crate::admin;

/// What an agent says of itself.
#[derive(Debug)]
pub(crate) struct Said {
    listen: SocketAddr,
    /// Whether it keeps its promise.
    pub(crate) ready: bool,
    /// None: it is of an earlier version, which does not say.
    cluster: Option<String>,
    /// None: it has not met its server yet.
    system_id: Option<SystemId>,
    /// Everything that it says.
    pub(crate) document: Value,
}

/// Asks. The error says why what answers is no agent, or that nobody does.
pub(crate) async fn ask(listen: SocketAddr) -> Result<Said, String> {
    let answer = admin::fetch(listen, "/status").await;
    let said = answer
        .map_err(|error| error.to_string())
        .and_then(|(code, body)| read(listen, code, &body));
    said.map_err(|why| format!("http://{listen}/status: {why}"))
}

fn read(listen: SocketAddr, code: u16, body: &str) -> Result<Said, String> {
    if code != 200 {
        return Err(format!("the answer has the HTTP code {code}"));
    }
    let no_agent = || "what answers there is not an agent's admin endpoint".to_owned();
    let document: Value = serde_json::from_str(body).map_err(|_| no_agent())?;
    Ok(Said {
        listen,
        ready: document["ready"].as_bool().ok_or_else(no_agent)?,
        cluster: named(&document).map_err(|()| no_agent())?,
        system_id: document["system_id"].as_str().and_then(|id| id.parse().ok()),
        document,
    })
}

/// An agent of an earlier version says no name, and that it is an agent only by the document's version.
fn named(document: &Value) -> Result<Option<String>, ()> {
    match document["cluster"].as_str() {
        None if document["version"].as_u64() != Some(1) => Err(()),
        cluster => Ok(cluster.map(str::to_owned)),
    }
}

impl Said {
    /// Whether it may be any cluster's agent.
    pub(crate) fn is_unnamed(&self) -> bool {
        self.cluster.is_none()
    }

    /// The system identifier, where the cluster has this name.
    pub(crate) fn lineage(&self, cluster: &ClusterName) -> Option<SystemId> {
        self.system_id
            .filter(|_| self.cluster.as_deref() == Some(cluster.as_str()))
    }

    /// Why it is not known to be this cluster's agent; none when it is. One that has not met its server yet says nothing
    /// good, and is taken for the one whose name it bears.
    pub(crate) fn why_strange(&self, cluster: &ClusterName, system_id: Option<SystemId>) -> Option<String> {
        let Some(name) = &self.cluster else {
            return Some(format!(
                "an agent of an earlier version answers at {}, which does not say whose it is: restart it",
                self.listen
            ));
        };
        let named = name == cluster.as_str();
        let theirs = match (self.system_id, system_id) {
            (None, _) if named && !self.ready => return None,
            (Some(theirs), Some(ours)) if named && theirs == ours => return None,
            (Some(theirs), _) => theirs.to_string(),
            (None, _) => "not known".to_owned(),
        };
        let what = format!(
            "of cluster {name} (system identifier {theirs}) answers at {}",
            self.listen
        );
        Some(match (named, system_id) {
            (true, None) => {
                format!(
                    "an agent {what}, and neither the server nor a region says whether that is this cluster"
                )
            }
            (true, Some(ours)) => format!("the agent {what}, not that of system identifier {ours}"),
            (false, _) => format!("the agent {what}, not that of cluster {cluster}"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OURS: SystemId = SystemId(7);

    fn heard(code: u16, body: &str) -> Result<Said, String> {
        read("127.0.0.1:9187".parse().unwrap(), code, body)
    }

    fn strange(body: &str, system_id: Option<SystemId>) -> Result<Option<String>, String> {
        let said = heard(200, body)?;
        Ok(said.why_strange(&"orders".parse().unwrap(), system_id))
    }

    #[test]
    fn an_agent_is_known_by_its_cluster_and_its_system_identifier() {
        let ours = r#"{"ready": true, "cluster": "orders", "system_id": "7"}"#;
        assert_eq!(strange(ours, Some(OURS)), Ok(None));
        let starting = r#"{"ready": false, "cluster": "orders", "system_id": null}"#;
        assert_eq!(strange(starting, Some(OURS)), Ok(None));
        assert_eq!(strange(starting, None), Ok(None));
        for (body, system_id, words) in [
            (
                r#"{"ready": true, "cluster": "billing", "system_id": "7"}"#,
                Some(OURS),
                "of cluster billing",
            ),
            (
                r#"{"ready": false, "cluster": "billing", "system_id": null}"#,
                None,
                "of cluster billing",
            ),
            (
                r#"{"ready": true, "cluster": "orders", "system_id": "8"}"#,
                Some(OURS),
                "system identifier 8",
            ),
            (ours, None, "neither the server nor a region"),
            (r#"{"ready": true, "cluster": "orders"}"#, Some(OURS), "not known"),
        ] {
            let why = strange(body, system_id).unwrap();
            assert!(
                why.as_ref().is_some_and(|why| why.contains(words)),
                "{body}: {why:?}"
            );
        }
    }

    #[test]
    fn an_agent_of_an_earlier_version_is_one_of_nobody() {
        let body = r#"{"version": 1, "ready": true, "durable": "0/1"}"#;
        assert!(heard(200, body).unwrap().is_unnamed());
        let why = strange(body, Some(OURS)).unwrap().unwrap();
        assert!(why.contains("restart it"), "{why}");
    }

    #[test]
    fn what_is_no_agent_is_not_taken_for_one() {
        let ours = r#"{"ready": true, "cluster": "orders", "system_id": "7"}"#;
        assert!(heard(503, ours).unwrap_err().contains("503"));
        for body in [
            "",
            "<html>",
            "{}",
            "[1]",
            r#"{"cluster": "orders", "system_id": "7"}"#,
            r#"{"ready": "yes", "cluster": "orders", "system_id": "7"}"#,
            r#"{"ready": true, "system_id": "7"}"#,
        ] {
            let why = heard(200, body).unwrap_err();
            assert!(why.contains("not an agent"), "{body}: {why}");
        }
    }
}
