//! Receivers that know nothing of Ringback, as processes: those of examples/, started by the commands of their README.

use ringback_test_support::files::{Folder, free_port};
use ringback_test_support::process::{Process, Spec};
use ringback_test_support::stack::Stack;
use ringback_test_support::tools;
use ringback_test_support::wait::until;
use serde_json::Value;
use std::path::{Path, PathBuf};

/// Where tools/setup has installed an example; `None` where it is missing and may be skipped.
pub fn installed(name: &str) -> Option<PathBuf> {
    let folder = tools::tool("examples").join(name);
    let how = format!("run tools/setup {name}");
    tools::need(folder.join(".ringback-stamp").is_file().then_some(()), name, &how)?;
    assert_same(&tools::root().join("examples").join(name), &folder, &how);
    Some(folder)
}

/// What runs must be what is in the repository.
fn assert_same(source: &Path, copy: &Path, how: &str) {
    for entry in std::fs::read_dir(source).expect("an example") {
        let path = entry.expect("an entry").path();
        let name = path.file_name().expect("a name");
        if ["node_modules", ".venv", ".next", "data", "__pycache__"].iter().any(|made| name == *made) {
            continue;
        }
        let other = copy.join(name);
        if path.is_dir() {
            assert_same(&path, &other, how);
        } else {
            let same = std::fs::read(&path).expect("a file") == std::fs::read(&other).unwrap_or_default();
            assert!(same, "{} is not what was installed: {how}", path.display());
        }
    }
}

/// The code block under a line of a README that starts with `begin`.
#[must_use]
pub fn block(readme: &str, begin: &str) -> String {
    let mut lines = readme.lines().skip_while(|line| !line.starts_with(begin));
    assert!(lines.next().is_some(), "the README has no line that starts with {begin:?}");
    let block: Vec<&str> = lines
        .skip_while(|line| !line.starts_with("```"))
        .skip(1)
        .take_while(|line| !line.starts_with("```"))
        .collect();
    assert!(!block.is_empty(), "there is no code under {begin:?}");
    block.join("\n")
}

/// A receiver that runs.
#[derive(Debug)]
pub struct Running {
    /// Its process.
    pub process: Process,
    /// Its base URL.
    pub base: String,
    folder: Folder,
    readme: String,
    documented: String,
}

impl Running {
    /// Starts an example as its README says, with the port that it names replaced by a free one.
    pub async fn example(name: &str, documented_port: u16, env: &[(&str, &str)]) -> Option<Self> {
        let source = tools::root().join("examples").join(name);
        let readme = std::fs::read_to_string(source.join("README.md")).expect("a README");
        let command = block(&readme, "Start it");
        let folder = Folder::new(name);
        let port = free_port();
        let command = command.replace(&documented_port.to_string(), &port.to_string());
        let mut words: Vec<&str> = command.split_whitespace().collect();
        let mut documented = Vec::new();
        while let Some((variable, value)) = words[0].split_once('=') {
            documented.push((variable.to_owned(), value.to_owned()));
            words.remove(0);
        }
        let mut spec = if words[..2] == ["cargo", "run"] {
            // Built beside `ringback`; cargo itself would wait for whoever builds.
            assert_eq!(words[2..], ["-p", name]);
            Spec::new(name, tools::ringback().with_file_name(name), folder.path())
        } else {
            let cwd = installed(name)?;
            let program = if words[0].contains('/') { cwd.join(words[0]) } else { PathBuf::from(words[0]) };
            let mut spec = Spec::new(name, program, folder.path()).args(&words[1..]);
            spec.cwd = Some(cwd);
            spec
        };
        for (variable, value) in documented {
            spec = spec.env(&variable, value);
        }
        spec = spec.env("DATA", folder.path().join("data").display().to_string());
        for (variable, value) in env {
            spec = spec.env(variable, *value);
        }
        let documented = format!("http://127.0.0.1:{documented_port}");
        Some(Self::spawn(spec, port, folder, readme, documented).await)
    }

    /// Starts a program of tests/receivers; it gets its port as the last argument.
    pub async fn program(program: &Path, args: &[String], env: &[(&str, &str)]) -> Self {
        let (folder, port) = (Folder::new("receiver"), free_port());
        let mut spec = Spec::new("receiver", program, folder.path()).args(args).args([port.to_string()]);
        for (variable, value) in env {
            spec = spec.env(variable, *value);
        }
        spec = spec.env("DATA", folder.path().join("data").display().to_string());
        Self::spawn(spec, port, folder, String::new(), String::new()).await
    }

    async fn spawn(spec: Spec, port: u16, folder: Folder, readme: String, documented: String) -> Self {
        let process = Process::spawn(spec);
        let mut this = Self { process, base: format!("http://127.0.0.1:{port}"), folder, readme, documented };
        this.listens().await;
        this
    }

    /// Waits until it listens.
    pub async fn listens(&mut self) {
        let address = self.base.trim_start_matches("http://").to_owned();
        let process = std::sync::Mutex::new(&mut self.process);
        until("the receiver to listen", crate::LATER, || async {
            if let Some(status) = process.lock().unwrap().exit_status() {
                panic!("the receiver ended with {status}");
            }
            tokio::net::TcpStream::connect(&address).await.ok()
        })
        .await;
    }

    /// `kill -9`, and a new start.
    pub async fn crash(&mut self) {
        self.process.kill9();
        self.start_again().await;
    }

    /// A new start after its end.
    pub async fn start_again(&mut self) {
        self.process = Process::spawn(self.process.spec().clone());
        self.listens().await;
    }

    /// A URL of it.
    #[must_use]
    pub fn url(&self, path: &str) -> String {
        format!("{}{path}", self.base)
    }

    /// A file of its data folder.
    #[must_use]
    pub fn data(&self, path: &str) -> PathBuf {
        self.folder.path().join("data").join(path)
    }

    /// The steps of a name that it has printed, one JSON object per line.
    #[must_use]
    pub fn steps(&self, step: &str) -> Vec<Value> {
        let log = self.process.log();
        let all = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        all.filter(|line| line["step"] == step).collect()
    }

    /// The steps of a name about a job.
    #[must_use]
    pub fn steps_of(&self, step: &str, job: &str) -> Vec<Value> {
        self.steps(step).into_iter().filter(|line| line["job"] == job).collect()
    }

    /// Waits for a step about a job.
    pub async fn wait_step(&self, step: &str, job: &str) -> Value {
        until(&format!("{step} of {job}"), crate::LATER, || async { self.steps_of(step, job).pop() }).await
    }

    /// A code block of the README, with its addresses replaced by those of this test.
    #[must_use]
    pub fn documented(&self, begin: &str, stack: &Stack) -> String {
        block(&self.readme, begin)
            .replace(&self.documented, &self.base)
            .replace("http://127.0.0.1:8080", stack.api.base())
    }

    /// Lines of a configuration that the README shows, with its addresses replaced.
    #[must_use]
    pub fn documented_settings(&self, begin: &str) -> String {
        block(&self.readme, begin).replace(&self.documented, &self.base)
    }

    /// Runs the README's command that submits a job; gives the job's id.
    #[must_use]
    pub fn send_documented_job(&self, stack: &Stack) -> String {
        let output = std::process::Command::new("sh")
            .args(["-c", &self.documented("Send it", stack)])
            .env("RINGBACK_API_KEY", stack.api.key())
            .output()
            .expect("run the README's command");
        let answer = String::from_utf8_lossy(&output.stdout).into_owned();
        let answered: Value =
            serde_json::from_str(&answer).unwrap_or_else(|error| panic!("{error}: {answer} {output:?}"));
        answered["id"].as_str().unwrap_or_else(|| panic!("no id: {answer}")).to_owned()
    }
}
