//! `shardlock serve`: one manager for all workers of a host.
//!
//! | file | what it does |
//! |---|---|
//! | `options`, `limits` | the command line; what clients may use at most |
//! | `listen`, `stream` | the sockets, own or from systemd; the socket of a connection |
//! | `requests`, `replies` | the framing of requests; writing replies in RESP2 and RESP3 |
//! | `command`, `command_table` | parsing a command; the commands that there are |
//! | `session`, `execute`, `describe` | a connection; executing its commands; longer replies |
//! | `acquire` | a LOCK as a request of the library |
//! | `held`, `clients` | the locks of all connections; who is connected |
//! | `clients_page`, `metrics` | the page `/clients` of the admin endpoint; the metrics |
//! | `agent` | what all connections share, and the phases from start to end |
//! | `access`, `defaults` | the password; the settings of requests, which SIGHUP changes |
//! | `service` | notifying systemd |

mod access;
mod acquire;
mod agent;
mod clients;
mod clients_page;
mod command;
mod command_table;
mod defaults;
mod describe;
mod execute;
#[cfg(test)]
mod fuzzing;
mod held;
mod limits;
mod listen;
mod metrics;
mod options;
mod replies;
mod requests;
mod service;
mod session;
mod stream;

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use anyhow::anyhow;
use rustix::process::Signal;
use tokio::runtime;
use tokio::signal::unix::{self, SignalKind};
use tokio::sync::mpsc;

use crate::exit::{self, Failure};
use crate::output;
use crate::signals::{ReceivedSignal, Signals};
use access::Access;
pub(crate) use access::read as read_password;
use agent::{Agent, Phase};
pub(crate) use clients_page::{ClientProcess, ClientsPage};
use defaults::Defaults;
pub(crate) use listen::VARIABLE as AGENT_VARIABLE;
use listen::{Listener, Listeners};
pub(crate) use options::Args;
use session::Session;

/// The signals that drain the agent.
const ENDING: &[(Signal, &str)] = &[(Signal::INT, "SIGINT"), (Signal::TERM, "SIGTERM")];

/// How long connections may take to receive their last replies.
const FAREWELL: Duration = Duration::from_secs(1);

/// The pause after a failure to accept a connection, such as when file descriptors have run out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

pub(crate) fn run(args: Args) -> Result<u8, Failure> {
    let mut builder = match args.threads {
        1 => runtime::Builder::new_current_thread(),
        _ => runtime::Builder::new_multi_thread(),
    };
    builder.worker_threads(usize::from(args.threads));
    crate::run_until_done(&mut builder, serve(args))
}

async fn serve(args: Args) -> Result<u8, Failure> {
    // From here on, no signal ends the agent before it has released its locks.
    let mut ending = Signals::install(ENDING).map_err(Failure::system)?;
    let mut hangup = unix::signal(SignalKind::hangup()).map_err(Failure::system)?;
    let config = args.shards.load_with_shards()?;
    let access = Access::load(args.listen.password_file.clone()).map_err(Failure::config)?;
    args.limits.raise_open_files();
    let unavailable = |error: anyhow::Error| Failure::new(exit::UNAVAILABLE, error);
    let Listeners {
        sockets,
        addresses,
        file,
        is_reachable,
    } = Listeners::open(&args.listen)?;
    if is_reachable && !access.needs_password() {
        return Err(Failure::usage(anyhow!(
            "the agent would listen on {}, which other hosts can reach; give it a --password-file, \
             or an address such as 127.0.0.1",
            addresses.join(" and ")
        )));
    }
    let admin = args.metrics.bind().map_err(unavailable)?;
    let locks = tokio::select! {
        connected = args.shards.connect(config.clone()) => connected?,
        signal = ending.next() => return Ok(signal.exit_code),
    };
    let agent = Arc::new(Agent::new(locks, args.limits.clone(), access, Defaults::new(config)));
    let admin = admin.map(|admin| {
        let agent = Arc::clone(&agent);
        admin.json_page("/clients", move || clients_page::render(&agent))
    });
    let server = admin.map(|admin| args.metrics.serve(admin, &agent.locks)).transpose();
    // Serve until the end of this function.
    let _server = server.map_err(unavailable)?;

    // Its receiver learns when all connections have ended.
    let (alive, mut all_ended) = mpsc::channel::<Infallible>(1);
    let accepting = sockets.into_iter().map(|socket| {
        let (agent, alive) = (Arc::clone(&agent), alive.clone());
        tokio::spawn(async move { accept(&socket, &agent, &alive).await })
    });
    let accepting: Vec<_> = accepting.collect();
    drop(alive);
    output::eprint(format_args!("listening on {}", addresses.join(" and ")));
    service::ready();

    let signal = serve_until_signal(&args, &agent, &mut ending, &mut hangup).await;
    output::eprint(format_args!(
        "{}: shutting down; no more locks are granted",
        signal.name
    ));
    service::stopping();
    // Ending the tasks closes the sockets. Clients get an error that they understand.
    for task in accepting {
        task.abort();
        // The task was aborted.
        task.await.ok();
    }
    drop(file);
    drain(&args, &agent, &mut ending).await;

    let released = agent.locks.shutdown().await;
    agent.enter(Phase::Stopping);
    // A client that does not read its replies keeps nobody waiting.
    tokio::time::timeout(FAREWELL, all_ended.recv()).await.ok();
    released.map_err(|error| Failure::new(exit::UNAVAILABLE, error))?;
    Ok(exit::OK)
}

/// Serves until a signal ends the agent, and reads settings again on SIGHUP.
async fn serve_until_signal(
    args: &Args,
    agent: &Agent,
    ending: &mut Signals,
    hangup: &mut unix::Signal,
) -> ReceivedSignal {
    loop {
        tokio::select! {
            signal = ending.next() => return signal,
            Some(()) = hangup.recv() => {
                service::reloading();
                reload(args, agent);
                service::ready();
            }
        }
    }
}

/// Reads the settings that can change while the agent runs. Those that can't be read stay as they
/// were.
fn reload(args: &Args, agent: &Agent) {
    let report = |what: &str, error: &anyhow::Error| {
        output::eprint(format_args!("{what}: {}; keeping the former", output::one_line(error)));
    };
    if let Err(error) = agent.access.reload() {
        report("the password was not changed", &error);
    }
    let loaded = args.shards.load_with_shards().map_err(|failure| failure.error);
    let loaded = loaded.and_then(|config| {
        config.validate()?;
        Ok(config)
    });
    match loaded {
        Ok(config) => {
            if agent.defaults.change(&config) {
                output::eprint(
                    "the configuration differs in more than ttl, timeout, max_hold, min_hold and \
                     linger; restart the agent to apply the rest",
                );
            }
            output::eprint("the settings were read again");
        }
        Err(error) => report("the settings were not changed", &error),
    }
}

/// Waits until no lock is held, the limit has passed, or another signal arrives.
async fn drain(args: &Args, agent: &Agent, ending: &mut Signals) {
    agent.enter(Phase::Draining);
    let held = agent.held.count();
    if held > 0 && !args.drain.is_zero() {
        let (locks, limit) = (locks(held), humantime::format_duration(args.drain));
        output::eprint(format_args!(
            "waiting up to {limit} for the release of {locks}; another signal ends the wait"
        ));
    }
    let reason = tokio::select! {
        () = agent.held.wait_until_empty() => return,
        () = tokio::time::sleep(args.drain) => "the limit of --drain has passed",
        signal = ending.next() => signal.name,
    };
    let locks = locks(agent.held.count());
    output::eprint(format_args!("{reason}: releasing {locks} still held"));
}

fn locks(count: usize) -> String {
    match count {
        1 => "1 lock".to_owned(),
        _ => format!("{count} locks"),
    }
}

/// Accepts connections until the task is aborted.
async fn accept(socket: &Listener, agent: &Arc<Agent>, alive: &mpsc::Sender<Infallible>) {
    loop {
        let (stream, peer) = match socket.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let most = agent.limits.max_connections;
        let Ok(client) = agent.clients.add(peer, most) else {
            agent.metrics.connections_refused.increment(1);
            tracing::warn!(%peer, most, "a connection was refused, because there are too many");
            let reply =
                format!("-LIMIT the agent has {most} connections, the most that it accepts (--max-connections)\r\n");
            // If the system does not take it at once, the client learns less.
            stream.try_send(reply.as_bytes()).ok();
            continue;
        };
        let session = Session::new(Arc::clone(agent), client, stream);
        let alive = alive.clone();
        tokio::spawn(async move {
            session.run().await;
            drop(alive);
        });
    }
}

#[cfg(test)]
mod tests {
    use crate::load::corpus;

    #[test]
    fn corpus_of_agent_requests_holds() {
        corpus::run("agent_requests", super::fuzzing::agent_requests);
    }
}
