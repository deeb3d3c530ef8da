//! The nodes of a Redis Cluster, as one of them reports them.

use deadpool_redis::redis::aio::MultiplexedConnection;
use deadpool_redis::redis::cmd;
use shardlock::tool::ServerUrl;

use super::query;

/// A node, as reported by itself or by another node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ClusterNode {
    pub(crate) id: String,
    /// `host:port`
    pub(crate) address: String,
    pub(crate) flags: String,
    /// The id of its primary, if it is a replica.
    pub(crate) primary: Option<String>,
    pub(crate) slots: u32,
    pub(crate) ranges: Vec<String>,
}

impl ClusterNode {
    /// Parses a reply to `CLUSTER NODES`. Malformed lines are skipped.
    pub(crate) fn parse_all(lines: &str, queried: &ServerUrl) -> Vec<Self> {
        lines.lines().filter_map(|line| parse(line, queried)).collect()
    }

    /// Whether the node has this flag.
    pub(crate) fn has_flag(&self, flag: &str) -> bool {
        self.flags.split(',').any(|known| known == flag)
    }
}

/// All nodes known to the connected one.
pub(crate) async fn cluster_nodes(
    connection: &mut MultiplexedConnection,
    queried: &ServerUrl,
) -> Result<Vec<ClusterNode>, String> {
    let lines: String = query(connection, cmd("CLUSTER").arg("NODES")).await?;
    Ok(ClusterNode::parse_all(&lines, queried))
}

fn parse(line: &str, queried: &ServerUrl) -> Option<ClusterNode> {
    let mut fields = line.split_whitespace();
    let (id, address, flags, primary) = (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
    let (address, rest) = address.split_once('@').unwrap_or((address, ""));
    let (host, port) = address.rsplit_once(':')?;
    // With TLS, the hostname if there is one: certificates are issued for names.
    let name = rest
        .split(',')
        .nth(1)
        .filter(|name| queried.is_encrypted() && !name.is_empty());
    let address = match (name.unwrap_or(host), flags.split(',').any(|flag| flag == "myself")) {
        // A node that has not met any other does not know its own address.
        ("", true) => queried.place().to_owned(),
        (host, _) => super::host_port(host, port),
    };
    let ranges: Vec<String> = fields
        .skip(4)
        .filter(|slots| !slots.starts_with('['))
        .map(str::to_owned)
        .collect();
    let slots = ranges.iter().filter_map(|range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        Some(last.parse::<u32>().ok()?.checked_sub(first.parse().ok()?)? + 1)
    });
    Some(ClusterNode {
        id: id.to_owned(),
        address,
        flags: flags.to_owned(),
        primary: (primary != "-").then(|| primary.to_owned()),
        slots: slots.sum(),
        ranges,
    })
}

#[cfg(test)]
mod tests {
    use shardlock::config::Endpoint;
    use shardlock::tool;

    use super::*;

    const LINES: &str = "\
        aa 10.0.0.1:6379@16379 myself,master - 0 0 1 connected 0-8190 8191 [93-<-bb]\n\
        bb 10.0.0.2:6379@16379,host-b master - 0 0 2 connected 8192-16383\n\
        cc ::1:6379@16379 slave aa 0 0 1 connected\n";

    #[test]
    fn lines_of_nodes_are_read() {
        let queried = tool::servers(&Endpoint::parse("redis+cluster://asked:1").unwrap()).remove(0);
        let nodes = ClusterNode::parse_all(LINES, &queried);
        let slots: Vec<_> = nodes.iter().map(|node| (node.address.as_str(), node.slots)).collect();
        assert_eq!(
            slots,
            [("10.0.0.1:6379", 8192), ("10.0.0.2:6379", 8192), ("[::1]:6379", 0)]
        );
        assert_eq!(nodes[2].primary.as_deref(), Some("aa"));
        assert!(nodes[0].has_flag("master") && !nodes[0].has_flag("mast"));
        let unmet = ClusterNode::parse_all("aa :6379@16379 myself,master - 0 0 0 connected", &queried);
        assert_eq!(unmet[0].address, "asked:1");
    }
}
