//! A certificate authority for one test, and servers that speak TLS.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, date_time_ymd,
};
use tempfile::TempDir;

use crate::server::{RedisServer, binary, free_port};

/// An authority and the directory of its issued certificates. The directory is removed when the
/// value is dropped.
pub struct Authority {
    dir: TempDir,
    issuer: Issuer<'static, KeyPair>,
}

/// A certificate and its key, as PEM files.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The file of the certificate.
    pub certificate: PathBuf,
    /// The file of its key.
    pub key: PathBuf,
}

impl Authority {
    /// Creates an authority that no client trusts yet.
    pub fn create() -> Self {
        let dir = tempfile::Builder::new()
            .prefix("shardlock-authority-")
            .tempdir()
            .expect("make a directory");
        let mut params = CertificateParams::new(Vec::new()).expect("parameters");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        // Clients would confuse two authorities with the same name.
        let name = format!("the authority of {}", dir.path().display());
        params.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate().expect("a key");
        let certificate = params.self_signed(&key).expect("a certificate");
        fs::write(dir.path().join("ca.pem"), certificate.pem()).expect("write");
        let issuer = Issuer::new(params, key);
        Self { dir, issuer }
    }

    /// Path of the authority's own certificate.
    pub fn ca(&self) -> PathBuf {
        self.dir.path().join("ca.pem")
    }

    /// The directory of all these files.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Issues a certificate for these host names or addresses, valid for servers and clients.
    pub fn issue(&self, name: &str, hosts: &[&str]) -> Identity {
        self.issue_until(name, hosts, 2200)
    }

    /// Issues an expired certificate.
    pub fn issue_expired(&self, name: &str, hosts: &[&str]) -> Identity {
        self.issue_until(name, hosts, 2001)
    }

    /// Creates a self-signed certificate for these hosts: that of an authority if `is_ca`,
    /// otherwise that of a server.
    pub fn self_signed(&self, name: &str, hosts: &[&str], is_ca: bool) -> Identity {
        let hosts: Vec<String> = hosts.iter().map(|&host| host.to_owned()).collect();
        let mut params = CertificateParams::new(hosts).expect("parameters");
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = match is_ca {
            true => IsCa::Ca(BasicConstraints::Unconstrained),
            false => IsCa::ExplicitNoCa,
        };
        let key = KeyPair::generate().expect("a key");
        let certificate = params.self_signed(&key).expect("a certificate");
        self.write(name, &certificate.pem(), &key)
    }

    fn issue_until(&self, name: &str, hosts: &[&str], year: i32) -> Identity {
        let hosts: Vec<String> = hosts.iter().map(|&host| host.to_owned()).collect();
        let mut params = CertificateParams::new(hosts).expect("parameters");
        params.distinguished_name.push(DnType::CommonName, name);
        params.not_before = date_time_ymd(2000, 1, 1);
        params.not_after = date_time_ymd(year, 1, 1);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &self.issuer).expect("a certificate");
        self.write(name, &certificate.pem(), &key)
    }

    fn write(&self, name: &str, certificate: &str, key: &KeyPair) -> Identity {
        let identity = Identity {
            certificate: self.dir.path().join(format!("{name}.pem")),
            key: self.dir.path().join(format!("{name}.key")),
        };
        fs::write(&identity.certificate, certificate).expect("write");
        fs::write(&identity.key, key.serialize_pem()).expect("write");
        identity
    }
}

/// A server with a plain port for the test and a TLS port.
pub struct TlsServer {
    /// The server, with its plain port.
    pub server: RedisServer,
    /// The TLS port on 127.0.0.1.
    pub tls_port: u16,
}

impl TlsServer {
    /// Starts a server with this certificate. If `demanding`, clients must present a certificate of
    /// the authority.
    ///
    /// A server built without TLS gets a TLS proxy in front of it.
    #[track_caller]
    pub fn start(authority: &Authority, identity: &Identity, demanding: bool, more: &[&str]) -> Self {
        let tls_port = free_port();
        if !has_tls() {
            let server = RedisServer::start_with(more);
            crate::tls_front::carry(
                tls_port,
                server.port(),
                &identity.certificate,
                &identity.key,
                demanding.then(|| authority.ca()).as_deref(),
            );
            return Self { server, tls_port };
        }
        let port = tls_port.to_string();
        let path = |path: &Path| path.to_str().expect("a path in UTF-8").to_owned();
        let (certificate, key, ca) = (path(&identity.certificate), path(&identity.key), path(&authority.ca()));
        let clients = if demanding { "yes" } else { "no" };
        let mut args = vec!["--tls-port", &port, "--tls-auth-clients", clients];
        args.extend([
            "--tls-cert-file",
            &certificate,
            "--tls-key-file",
            &key,
            "--tls-ca-cert-file",
            &ca,
        ]);
        args.extend(more);
        Self {
            server: RedisServer::start_with(&args),
            tls_port,
        }
    }

    /// `rediss://host:port` with the given host.
    pub fn url(&self, host: &str) -> String {
        format!("rediss://{host}:{}", self.tls_port)
    }
}

/// Whether the server was built with TLS. Started without a certificate, the server exits and logs
/// whether it lacks TLS support or the certificate.
pub fn has_tls() -> bool {
    static HAS_TLS: OnceLock<bool> = OnceLock::new();
    *HAS_TLS.get_or_init(|| {
        let mut command = Command::new(&binary().path);
        command.args([
            "--port",
            "0",
            "--bind",
            "127.0.0.1",
            "--tls-port",
            &free_port().to_string(),
        ]);
        let output = command.stdin(Stdio::null()).output().expect("start a server");
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(
            !output.status.success(),
            "a server without a certificate keeps running: {said}"
        );
        let lacks_tls = said.contains("Failed finding TLS support");
        assert!(lacks_tls || said.contains("No tls-cert-file configured"), "{said}");
        !lacks_tls
    })
}
