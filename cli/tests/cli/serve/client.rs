//! A process with a connection to an agent.

use std::path::Path;

use support::worker::Current;
use support::{RespClient, resp};

/// Sends each line of the test to the agent, and each reply to the test.
pub(crate) fn run(me: &Current) {
    let mut client = RespClient::unix(Path::new(&me.var("SHARDLOCK_TEST_SOCKET"))).expect("connect");
    while let Some(line) = me.recv() {
        client.send_bytes(format!("{line}\n").as_bytes()).expect("send");
        let reply = client.reply();
        me.send(resp::shown(&reply));
    }
}
