//! The sockets on which the agent listens: its own, or those that systemd passes.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixStream as BlockingUnixStream;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail, ensure};
use listenfd::ListenFd;
use rustix::fs::{FlockOperation, flock};
use rustix::process::umask;
use tokio::net::{TcpListener, UnixListener};
use uzers::{get_group_by_name, get_user_by_name};

use super::clients::Peer;
use super::options::ListenOptions;
use super::stream::Stream;
use crate::exit::{self, Failure};

/// The environment variable with the path of the socket, for the agent and for its clients.
pub(crate) const VARIABLE: &str = "SHARDLOCK_AGENT";

const DEFAULT_PATH: &str = "/run/shardlock/agent.sock";

/// A socket on which the agent listens.
#[derive(Debug)]
pub(super) enum Listener {
    Unix(UnixListener),
    Tcp(TcpListener),
}

/// All sockets on which the agent listens.
#[derive(Debug)]
pub(super) struct Listeners {
    pub(super) sockets: Vec<Listener>,
    /// Where clients connect, for messages.
    pub(super) addresses: Vec<String>,
    /// The file of a socket that the agent has made.
    pub(super) file: Option<SocketFile>,
    /// Whether another host may connect.
    pub(super) is_reachable: bool,
}

/// The file of a Unix socket. Dropping it removes the file.
#[derive(Debug)]
pub(super) struct SocketFile {
    path: PathBuf,
    /// Locked for as long as the agent uses the path, so that no second agent replaces the socket.
    _lock: File,
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // It may have been removed by hand.
        fs::remove_file(&self.path).ok();
    }
}

impl Listener {
    /// Waits for the next client. Returns an error of this connection, or of the system.
    pub(super) async fn accept(&self) -> io::Result<(Stream, Peer)> {
        match self {
            Self::Unix(listener) => {
                let (stream, _) = listener.accept().await?;
                let from = stream.peer_cred()?;
                let peer = Peer::Process {
                    // 0 if the process is in a namespace that this one can't see.
                    pid: from.pid().filter(|&pid| pid > 0),
                    uid: from.uid(),
                    gid: from.gid(),
                };
                Ok((Stream::Unix(stream), peer))
            }
            Self::Tcp(listener) => {
                let (stream, address) = listener.accept().await?;
                Ok((Stream::of_tcp(stream)?, Peer::Address(address)))
            }
        }
    }
}

impl Listeners {
    /// Takes over the sockets of systemd, or else binds those of the options.
    pub(super) fn open(options: &ListenOptions) -> Result<Self, Failure> {
        let owner = options.socket_owner.as_deref().map(Owner::parse).transpose();
        let owner = owner.map_err(Failure::usage)?;
        let passed = ListenFd::from_env();
        if passed.len() > 0 && (options.socket.is_some() || options.listen.is_some()) {
            return Err(Failure::usage(anyhow!(
                "systemd passes sockets (LISTEN_FDS), so --socket and --listen can't be given: \
                 remove them, or start the agent without its socket unit"
            )));
        }
        let opened = if passed.len() > 0 {
            Self::take_over_all(passed)
        } else {
            Self::bind_all(options, owner)
        };
        opened.map_err(|error| Failure::new(exit::UNAVAILABLE, error))
    }

    const fn none() -> Self {
        Self {
            sockets: Vec::new(),
            addresses: Vec::new(),
            file: None,
            is_reachable: false,
        }
    }

    fn take_over_all(mut passed: ListenFd) -> Result<Self> {
        let mut listeners = Self::none();
        for index in 0..passed.len() {
            listeners.take_over(&mut passed, index)?;
        }
        Ok(listeners)
    }

    fn bind_all(options: &ListenOptions, owner: Option<Owner>) -> Result<Self> {
        let mut listeners = Self::none();
        listeners.bind_unix(options, owner)?;
        if let Some(address) = options.listen {
            let socket =
                std::net::TcpListener::bind(address).with_context(|| format!("the agent can't listen on {address}"))?;
            listeners.add_tcp(socket)?;
        }
        Ok(listeners)
    }

    fn take_over(&mut self, passed: &mut ListenFd, index: usize) -> Result<()> {
        if let Ok(Some(socket)) = passed.take_unix_listener(index) {
            return self.add_unix(socket);
        }
        match passed.take_tcp_listener(index) {
            Ok(Some(socket)) => self.add_tcp(socket),
            _ => Err(anyhow!(
                "socket {index} that systemd passes is neither a Unix stream socket nor TCP; \
                 correct ListenStream= of the socket unit"
            )),
        }
    }

    fn bind_unix(&mut self, options: &ListenOptions, owner: Option<Owner>) -> Result<()> {
        let from_env = std::env::var_os(VARIABLE).filter(|path| !path.is_empty());
        let path = options.socket.clone().or_else(|| from_env.map(PathBuf::from));
        let path = path.unwrap_or_else(|| PathBuf::from(DEFAULT_PATH));
        let lock = lock_path(&path)?;
        remove_stale(&path)?;
        // Nobody may connect before the owner and the mode are set.
        let mask = umask(rustix::fs::Mode::from_raw_mode(0o777));
        let bound = std::os::unix::net::UnixListener::bind(&path);
        umask(mask);
        let name = path.display();
        let socket = bound.with_context(|| format!("the agent can't listen on {name}"))?;
        self.file = Some(SocketFile {
            path: path.clone(),
            _lock: lock,
        });
        if let Some(owner) = owner {
            std::os::unix::fs::chown(&path, owner.user, owner.group)
                .with_context(|| format!("the owner of {name} can't be changed"))?;
        }
        fs::set_permissions(&path, fs::Permissions::from_mode(options.socket_mode))
            .with_context(|| format!("the mode of {name} can't be changed"))?;
        self.add_unix(socket)
    }

    fn add_unix(&mut self, socket: std::os::unix::net::UnixListener) -> Result<()> {
        let address = socket.local_addr()?;
        let address = match address.as_pathname() {
            Some(path) => path.display().to_string(),
            None => format!("{address:?}"),
        };
        socket.set_nonblocking(true)?;
        self.sockets.push(Listener::Unix(UnixListener::from_std(socket)?));
        self.addresses.push(address);
        Ok(())
    }

    fn add_tcp(&mut self, socket: std::net::TcpListener) -> Result<()> {
        let address: SocketAddr = socket.local_addr()?;
        socket.set_nonblocking(true)?;
        self.sockets.push(Listener::Tcp(TcpListener::from_std(socket)?));
        self.addresses.push(address.to_string());
        self.is_reachable |= !address.ip().is_loopback();
        Ok(())
    }
}

/// Makes sure that no other agent uses the path. The file beside the socket stays when the agent
/// ends: removing it could let two agents lock two files.
fn lock_path(path: &Path) -> Result<File> {
    let mut name = path.as_os_str().to_owned();
    name.push(".lock");
    let name = PathBuf::from(name);
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(&name)
        .with_context(|| {
            let (path, name) = (path.display(), name.display());
            format!(
                "can't listen on {path}: its lock file {name} can't be opened; \
                 give --socket a path in a folder that exists and is yours"
            )
        })?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => {
            let path = path.display();
            bail!("another agent listens on {path}; stop it, or give --socket another path")
        }
        Err(error) => {
            let name = name.display();
            Err(error).with_context(|| format!("{name} can't be locked"))
        }
    }
}

/// Removes the socket that an agent left behind when it was killed.
fn remove_stale(path: &Path) -> Result<()> {
    let name = path.display();
    let found = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        found => found.with_context(|| format!("{name} can't be read"))?,
    };
    ensure!(
        found.file_type().is_socket(),
        "{name} exists and is not a socket; remove it, or give --socket another path"
    );
    ensure!(
        BlockingUnixStream::connect(path).is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused),
        "another program listens on {name}; stop it, or give --socket another path"
    );
    fs::remove_file(path).with_context(|| format!("{name} of a former agent can't be removed"))
}

/// The owner of a socket file.
#[derive(Debug, PartialEq, Eq)]
struct Owner {
    user: Option<u32>,
    group: Option<u32>,
}

impl Owner {
    /// Parses `user`, `user:group` or `:group`, each a name or a number.
    fn parse(text: &str) -> Result<Self> {
        let (user, group) = match text.split_once(':') {
            Some((user, group)) => (user, Some(group)),
            None => (text, None),
        };
        let user = Some(user).filter(|user| !user.is_empty());
        ensure!(
            user.is_some() || group.is_some_and(|group| !group.is_empty()),
            "--socket-owner is {text:?}, but must be USER, USER:GROUP or :GROUP"
        );
        let user = user.map(|user| id_of(user, "user", || Some(get_user_by_name(user)?.uid())));
        let group = group.filter(|group| !group.is_empty());
        let group = group.map(|group| id_of(group, "group", || Some(get_group_by_name(group)?.gid())));
        Ok(Self {
            user: user.transpose()?,
            group: group.transpose()?,
        })
    }
}

fn id_of(name: &str, kind: &str, find: impl FnOnce() -> Option<u32>) -> Result<u32> {
    if let Ok(id) = name.parse() {
        return Ok(id);
    }
    find().ok_or_else(|| anyhow!("--socket-owner names the {kind} {name:?}, which does not exist"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owner_is_a_name_or_a_number() {
        let owner = |text| Owner::parse(text).map_err(|error| error.to_string());
        let root = Owner {
            user: Some(0),
            group: Some(0),
        };
        assert_eq!(owner("root:root"), Ok(root));
        let group = Owner {
            user: None,
            group: Some(7),
        };
        assert_eq!(owner(":7"), Ok(group));
        let user = Owner {
            user: Some(7),
            group: None,
        };
        assert_eq!(owner("7"), Ok(user));
        assert!(owner(":").unwrap_err().contains("must be USER"));
        let unknown = owner("no-such-user:root").unwrap_err();
        assert!(unknown.contains("\"no-such-user\", which does not exist"), "{unknown}");
    }
}
