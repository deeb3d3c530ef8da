//! A real etcd for one test, with one or several members.
//!
//! Each member has its own free ports on 127.0.0.1 and its own directory, so tests run side by side
//! and share no state. The members are killed when the value is dropped, or at the latest when the
//! test process ends.

use std::collections::BTreeMap;
use std::env;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use etcd_client::{Client, ConnectOptions, GetOptions, SortOrder, SortTarget};
use parking_lot::Mutex;
use tempfile::TempDir;

use crate::directory::directory;
use crate::process::Process;
use crate::server::free_port;
use crate::wait::PATIENCE;

/// Etcd's shortest lease is 1.5 times this, rounded up to whole seconds.
const ELECTION_MS: u32 = 1_000;
/// The shortest lease that these members grant.
pub const LEASE_MIN: Duration = Duration::from_secs(2);

/// A running etcd.
pub struct Etcd {
    members: Vec<Member>,
    dir: TempDir,
    tls: Option<tls::Files>,
}

struct Member {
    name: String,
    port: u16,
    peer_port: u16,
    /// `None` while the member is down.
    process: Mutex<Option<Process>>,
}

impl Etcd {
    /// Starts an etcd with one member and waits until it answers.
    pub async fn start() -> Self {
        Self::start_members(1).await
    }

    /// Starts an etcd with `count` members and waits until all of them answer.
    pub async fn start_members(count: usize) -> Self {
        Self::prepare(count).start_all().await
    }

    fn prepare(count: usize) -> Self {
        let dir = directory("etcd");
        let members = (0..count)
            .map(|number| Member {
                name: format!("m{number}"),
                port: free_port(),
                peer_port: free_port(),
                process: Mutex::new(None),
            })
            .collect();
        Self {
            members,
            dir,
            tls: None,
        }
    }

    /// Starts an etcd with one member that only accepts TLS connections, from clients with a
    /// certificate of the same authority.
    pub async fn start_with_tls() -> Self {
        let etcd = Self::prepare(1);
        let tls = Some(tls::Files::make(etcd.dir.path()));
        Self { tls, ..etcd }.start_all().await
    }

    /// The certificate files for TLS connections.
    pub fn tls(&self) -> &tls::Files {
        self.tls.as_ref().expect("started with TLS")
    }

    async fn start_all(self) -> Self {
        let count = self.members.len();
        for number in 0..count {
            self.launch(number);
        }
        for number in 0..count {
            self.is_ready(number).await;
        }
        self
    }

    /// `etcd://127.0.0.1:<port>,...`
    pub fn url(&self) -> String {
        format!(
            "{}://{}",
            if self.is_encrypted() { "etcds" } else { "etcd" },
            self.hosts()
        )
    }

    fn is_encrypted(&self) -> bool {
        self.tls.is_some()
    }

    /// `127.0.0.1:<port>,...`
    pub fn hosts(&self) -> String {
        let places: Vec<String> = (0..self.members.len()).map(|number| self.place(number)).collect();
        places.join(",")
    }

    /// `127.0.0.1:<port>` of one member.
    pub fn place(&self, number: usize) -> String {
        format!("{}:{}", Ipv4Addr::LOCALHOST, self.members[number].port)
    }

    /// The log of a member.
    pub fn log(&self, number: usize) -> String {
        fs::read_to_string(self.log_path(number)).unwrap_or_default()
    }

    /// A client connected to one member.
    pub async fn client_of(&self, number: usize) -> Client {
        let options = ConnectOptions::new().with_timeout(PATIENCE);
        let options = match &self.tls {
            Some(files) => options.with_tls(files.for_client()),
            None => options,
        };
        Client::connect([self.place(number)], Some(options))
            .await
            .expect("connect to etcd")
    }

    /// A client connected to the first member that is up.
    pub async fn client(&self) -> Client {
        let is_up = |member: &Member| member.process.lock().is_some();
        let number = self.members.iter().position(is_up).expect("a member is up");
        self.client_of(number).await
    }

    /// All keys, in creation order.
    pub async fn keys(&self) -> Vec<String> {
        let found = self
            .answer(async |mut client| {
                let oldest_first = GetOptions::new()
                    .with_all_keys()
                    .with_keys_only()
                    .with_sort(SortTarget::Create, SortOrder::Ascend);
                client.get("", Some(oldest_first)).await
            })
            .await;
        let name = |kv: &etcd_client::KeyValue| String::from_utf8_lossy(kv.key()).into_owned();
        found.kvs().iter().map(name).collect()
    }

    /// Retries until there is an answer: etcd does not answer while it elects a leader.
    async fn answer<T>(&self, ask: impl AsyncFn(Client) -> Result<T, etcd_client::Error>) -> T {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match ask(self.client().await).await {
                Ok(answer) => return answer,
                Err(error) => assert!(Instant::now() < deadline, "no answer for {PATIENCE:?}: {error}"),
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// The keys that belong to locks, including notes: everything except the shard map.
    pub async fn lock_keys(&self) -> Vec<String> {
        let mut keys = self.keys().await;
        keys.retain(|key| key.starts_with("lock:") && key != "lock:%map");
        keys
    }

    /// Number of leases.
    pub async fn leases(&self) -> usize {
        self.answer(async |mut client| client.leases().await)
            .await
            .leases()
            .len()
    }

    /// Index of the leader.
    pub async fn leader(&self) -> usize {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            for number in 0..self.members.len() {
                if self.members[number].process.lock().is_none() {
                    continue;
                }
                if let Ok(status) = self.client_of(number).await.status().await
                    && status
                        .header()
                        .is_some_and(|header| header.member_id() == status.leader())
                {
                    return number;
                }
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("etcd had no leader for {PATIENCE:?}:\n{}", self.log(0));
    }

    /// Number of requests per gRPC method (`Txn`, `LeaseGrant`, ...) that the members have received
    /// since they were started.
    pub fn requests(&self) -> BTreeMap<String, u64> {
        let mut requests = BTreeMap::new();
        for member in self.members.iter().filter(|member| member.process.lock().is_some()) {
            for line in metrics(member.port).lines() {
                let Some(labels) = line.strip_prefix("grpc_server_started_total{grpc_method=\"") else {
                    continue;
                };
                let method = labels.split('"').next().expect("a method has a name");
                let count: f64 = line.rsplit(' ').next().expect("a count").parse().expect("a number");
                *requests.entry(method.to_owned()).or_default() += count as u64;
            }
        }
        requests
    }

    /// SIGKILL, then reaps.
    pub fn kill(&self, number: usize) {
        *self.members[number].process.lock() = None;
    }

    /// Starts a killed member again with its stored data, and waits until it answers.
    pub async fn restart(&self, number: usize) {
        self.kill(number);
        self.launch(number);
        self.is_ready(number).await;
    }

    /// Copies the stored data of a member that is down.
    pub fn back_up(&self, number: usize) -> TempDir {
        let backup = directory("backup");
        copy(&self.data_dir(number), &backup.path().join("data"));
        backup
    }

    /// Replaces the stored data of a member that is down with a copy.
    pub fn restore(&self, number: usize, backup: &TempDir) {
        fs::remove_dir_all(self.data_dir(number)).expect("remove the stored data");
        copy(&backup.path().join("data"), &self.data_dir(number));
    }

    /// SIGSTOP: the kernel still accepts connections, but the process does not answer.
    pub fn stop(&self, number: usize) {
        self.with_process(number, Process::stop);
    }

    /// SIGCONT.
    pub fn cont(&self, number: usize) {
        self.with_process(number, Process::cont);
    }

    fn with_process(&self, number: usize, act: impl FnOnce(&Process)) {
        act(self.members[number]
            .process
            .lock()
            .as_ref()
            .expect("the member is down"));
    }

    fn log_path(&self, number: usize) -> PathBuf {
        self.dir.path().join(format!("m{number}.log"))
    }

    fn data_dir(&self, number: usize) -> PathBuf {
        self.dir.path().join(&self.members[number].name)
    }

    fn launch(&self, number: usize) {
        let member = &self.members[number];
        let url = |port: u16| format!("http://{}:{port}", Ipv4Addr::LOCALHOST);
        let client_url = match self.is_encrypted() {
            true => url(member.port).replace("http:", "https:"),
            false => url(member.port),
        };
        let peers: Vec<String> = self
            .members
            .iter()
            .map(|member| format!("{}={}", member.name, url(member.peer_port)))
            .collect();
        let log = File::create(self.log_path(number)).expect("make a log file");
        let mut command = Command::new(find_binary());
        for (name, _) in env::vars_os() {
            if name.to_string_lossy().starts_with("ETCD_") {
                command.env_remove(name);
            }
        }
        command
            .args(["--name", &member.name, "--data-dir"])
            .arg(self.data_dir(number))
            .args(["--listen-client-urls", &client_url])
            .args(["--advertise-client-urls", &client_url])
            .args(["--listen-peer-urls", &url(member.peer_port)])
            .args(["--initial-advertise-peer-urls", &url(member.peer_port)])
            .args(["--initial-cluster", &peers.join(",")])
            .args(["--initial-cluster-state", "new", "--initial-cluster-token"])
            .arg(self.dir.path().file_name().expect("the directory has a name"))
            .args(["--heartbeat-interval", "100", "--election-timeout"])
            .arg(ELECTION_MS.to_string())
            .stdin(Stdio::null())
            .stderr(log.try_clone().expect("share the log file"))
            .stdout(log);
        if let Some(files) = &self.tls {
            command.arg("--client-cert-auth");
            command.arg("--trusted-ca-file").arg(&files.ca);
            command.arg("--cert-file").arg(&files.cert);
            command.arg("--key-file").arg(&files.key);
        }
        let process = Process::spawn(command).expect("start etcd");
        *member.process.lock() = Some(process);
    }

    /// Waits until a member answers, which requires a leader.
    async fn is_ready(&self, number: usize) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let ended = self.members[number].process.lock().as_mut().and_then(Process::ended);
            if let Some(status) = ended {
                panic!("etcd ended at its start with {status}:\n{}", self.log(number));
            }
            let mut client = self.client_of(number).await;
            let answer = tokio::time::timeout(Duration::from_secs(1), client.get("ready", None)).await;
            if matches!(answer, Ok(Ok(_))) {
                return;
            }
            assert!(Instant::now() < deadline, "no answer from etcd:\n{}", self.log(number));
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("make a directory");
    for entry in fs::read_dir(from).expect("read a directory") {
        let entry = entry.expect("read a directory");
        let to = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &to);
        } else {
            fs::copy(entry.path(), to).expect("copy a file");
        }
    }
}

fn metrics(port: u16) -> String {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).expect("connect to etcd");
    stream.set_read_timeout(Some(PATIENCE)).expect("set a time limit");
    stream
        .write_all(b"GET /metrics HTTP/1.0\r\nHost: etcd\r\n\r\n")
        .expect("ask for metrics");
    let mut text = String::new();
    stream.read_to_string(&mut text).expect("read metrics");
    text
}

/// Searches the same places in the same order as `scripts/ensure-etcd`, which also installs etcd.
fn find_binary() -> PathBuf {
    if let Some(path) = env::var_os("SHARDLOCK_ETCD_SERVER").filter(|path| !path.is_empty()) {
        return path.into();
    }
    let path = env::var_os("PATH").unwrap_or_default();
    let mut candidates = env::split_paths(&path)
        .map(|dir| dir.join("etcd"))
        .chain(["/usr/local/bin/etcd", "/usr/bin/etcd"].map(|path| Path::new(path).to_owned()));
    candidates.find(|path| path.is_file()).unwrap_or_else(|| {
        panic!("there is no etcd on the PATH: `make test` installs it, or set SHARDLOCK_ETCD_SERVER to its path")
    })
}

/// An authority and one certificate that it issued, used by the server and its clients.
pub mod tls {
    use std::fs;
    use std::path::{Path, PathBuf};

    use etcd_client::{Certificate, Identity, TlsOptions};
    use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};

    /// PEM files.
    pub struct Files {
        /// The certificate of the authority.
        pub ca: PathBuf,
        /// The certificate that it issued.
        pub cert: PathBuf,
        /// The key of that certificate.
        pub key: PathBuf,
    }

    impl Files {
        /// Creates an authority and a certificate, and writes them to files in this directory.
        pub fn make(dir: &Path) -> Self {
            let mut authority = CertificateParams::new([]).expect("an authority");
            authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            let key = KeyPair::generate().expect("make a key");
            let ca = authority.self_signed(&key).expect("sign a certificate");
            let issuer = Issuer::new(authority, key);
            let key = KeyPair::generate().expect("make a key");
            let server = CertificateParams::new(["127.0.0.1".to_owned()]).expect("a server");
            let cert = server.signed_by(&key, &issuer).expect("sign a certificate");
            let write = |name: &str, pem: String| {
                let path = dir.join(name);
                fs::write(&path, pem).expect("write a file");
                path
            };
            Self {
                ca: write("ca.pem", ca.pem()),
                cert: write("cert.pem", cert.pem()),
                key: write("key.pem", key.serialize_pem()),
            }
        }

        pub(super) fn for_client(&self) -> TlsOptions {
            let read = |path: &Path| fs::read(path).expect("read a file");
            TlsOptions::new()
                .ca_certificate(Certificate::from_pem(read(&self.ca)))
                .identity(Identity::from_pem(read(&self.cert), read(&self.key)))
        }
    }
}
