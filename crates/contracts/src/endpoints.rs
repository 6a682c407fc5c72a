//! What a worker asks of its endpoints at its start.

use ringback_domain::{EndpointId, Name};

use crate::{ContractError, read_version, v1};

/// An endpoint as SQL knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointKey {
    /// Name of the project that owns it.
    pub project: Name,
    /// Its name in URLs.
    pub name: Name,
    /// Its key; the token in subjects.
    pub id: EndpointId,
    /// Revision of the configuration that the API works with.
    pub config_revision: u64,
}

/// What a worker is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointFacts {
    /// Shards of the work queue, at least 1.
    pub shards: u32,
    /// The endpoints that are in SQL.
    pub endpoints: Vec<EndpointKey>,
}

/// Reads what a worker asks for: (project, endpoint).
pub fn endpoint_names_of(request: &v1::EndpointsRequest) -> Result<Vec<(Name, Name)>, ContractError> {
    read_version(request.version)?;
    request.endpoints.iter().map(|e| names(&e.project, &e.name)).collect()
}

/// Reads what the tracker answers.
pub fn endpoint_facts_of(reply: &v1::EndpointsReply) -> Result<EndpointFacts, ContractError> {
    if reply.shards == 0 {
        return Err(ContractError::Field { field: "shards" });
    }
    let endpoints = reply.endpoints.iter().map(|e| {
        let (project, name) = names(&e.project, &e.name)?;
        if e.id <= 0 {
            return Err(ContractError::Field { field: "endpoints.id" });
        }
        Ok(EndpointKey { project, name, id: EndpointId(e.id), config_revision: e.config_revision })
    });
    Ok(EndpointFacts { shards: reply.shards, endpoints: endpoints.collect::<Result<_, _>>()? })
}

fn names(project: &str, name: &str) -> Result<(Name, Name), ContractError> {
    let read = |text, field| Name::parse(text).map_err(|_| ContractError::Field { field });
    Ok((read(project, "endpoints.project")?, read(name, "endpoints.name")?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::VERSION;

    fn reply() -> v1::EndpointsReply {
        let key = v1::EndpointKey { project: "p".into(), name: "e".into(), id: 7, config_revision: 9 };
        v1::EndpointsReply { shards: 4, endpoints: vec![key] }
    }

    #[test]
    fn reads_what_a_correct_sender_says() {
        let facts = endpoint_facts_of(&reply()).unwrap();
        assert_eq!(
            (facts.shards, facts.endpoints[0].id, facts.endpoints[0].config_revision),
            (4, EndpointId(7), 9)
        );
        let name = v1::EndpointName { project: "p".into(), name: "e".into() };
        let request = v1::EndpointsRequest { version: VERSION, endpoints: vec![name] };
        let names = endpoint_names_of(&request).unwrap();
        assert_eq!((names[0].0.as_str(), names[0].1.as_str()), ("p", "e"));
    }

    #[test]
    fn refuses_the_rest() {
        let changed = |change: fn(&mut v1::EndpointsReply)| {
            let mut reply = reply();
            change(&mut reply);
            endpoint_facts_of(&reply).unwrap_err().to_string()
        };
        assert!(changed(|r| r.shards = 0).contains("`shards`"));
        assert!(changed(|r| r.endpoints[0].id = 0).contains("`endpoints.id`"));
        assert!(changed(|r| r.endpoints[0].name = "a.b".into()).contains("`endpoints.name`"));
        let request = v1::EndpointsRequest { version: 99, endpoints: Vec::new() };
        assert!(matches!(endpoint_names_of(&request), Err(ContractError::Version { got: 99 })));
    }
}
