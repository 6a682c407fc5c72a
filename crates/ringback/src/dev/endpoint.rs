//! `NAME=process:CMD`, `NAME=builtin:echo`, `NAME=builtin:encoder,model=PATH`, with `,slots=N,timeout=TIME` behind.

use crate::ui::when::parse_span_ms;
use ringback_service_runtime::config::{
    Builtin, CommandLine, EncoderConfig, EndpointConfig, ExecutorConfig, ProcessConfig,
};

/// Slots of a built-in engine: it costs next to nothing.
const BUILTIN_SLOTS: u32 = 16;

/// An endpoint given on the command line.
#[derive(Clone, Debug)]
pub(crate) struct EndpointSpec(pub(crate) EndpointConfig);

impl EndpointSpec {
    /// Reads a specification.
    ///
    /// # Errors
    /// What is wrong and an example.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let example =
            "write for example echo=builtin:echo or 'tts=process:python3 -u handler.py,slots=2,timeout=60'";
        let (name, rest) = text.split_once('=').ok_or_else(|| format!("has no NAME=; {example}"))?;
        ringback_domain::Name::parse(name).map_err(|error| format!("the name `{name}` {error}"))?;
        let encodes = rest == "builtin:encoder" || rest.starts_with("builtin:encoder,");
        let (rest, options) = split_options(rest, encodes);
        let executor = match rest.split_once(':') {
            Some(("builtin", "echo")) => ExecutorConfig::Builtin(Builtin::Echo),
            Some(("builtin", "sleep")) => ExecutorConfig::Builtin(Builtin::Sleep),
            Some(("builtin", "encoder")) => ExecutorConfig::Builtin(Builtin::Encoder(encoder(&options)?)),
            Some(("builtin", other)) => {
                return Err(format!("`{other}` is no builtin; there are echo, sleep and encoder"));
            }
            Some(("process", command)) if !command.trim().is_empty() => {
                ExecutorConfig::Process(ProcessConfig {
                    command: command_line(command),
                    ..ProcessConfig::default()
                })
            }
            Some(("process", _)) => return Err(format!("has no command after process:; {example}")),
            Some(("http", _)) => {
                return Err(
                    "http endpoints are not supported by this version; use process or builtin".to_owned()
                );
            }
            _ => return Err(format!("says neither process: nor builtin: after the name; {example}")),
        };
        let mut endpoint = EndpointConfig::new(name, executor);
        if matches!(endpoint.executor, Some(ExecutorConfig::Builtin(Builtin::Echo | Builtin::Sleep))) {
            endpoint.slots = Some(BUILTIN_SLOTS);
        }
        for (key, value) in options {
            match key {
                "slots" => {
                    let slots =
                        value.parse().map_err(|_| format!("slots={value}: must be a number, at least 1"));
                    endpoint.slots = Some(slots?);
                }
                "timeout" => {
                    endpoint.execution_timeout_ms =
                        parse_span_ms(value).map_err(|error| format!("timeout: {error}"))?;
                }
                // Those of the encoder were read with it.
                _ => {}
            }
        }
        Ok(Self(endpoint))
    }

    /// What runs when nobody says anything.
    pub(crate) fn defaults() -> Vec<EndpointConfig> {
        [("echo", Builtin::Echo), ("sleep", Builtin::Sleep)]
            .into_iter()
            .map(|(name, builtin)| EndpointConfig {
                slots: Some(BUILTIN_SLOTS),
                ..EndpointConfig::new(name, ExecutorConfig::Builtin(builtin))
            })
            .collect()
    }
}

/// Reads the encoder's own options as its section of a configuration file.
fn encoder(options: &[(&str, &str)]) -> Result<EncoderConfig, String> {
    let example = "embed=builtin:encoder,model=.tools/models/all-MiniLM-L6-v2,task=embed";
    let mut section = toml::Table::new();
    for (key, text) in options.iter().filter(|(key, _)| !matches!(*key, "slots" | "timeout")) {
        let typed = text
            .parse::<i64>()
            .map(toml::Value::from)
            .or_else(|_| text.parse::<bool>().map(toml::Value::from));
        section.insert((*key).to_owned(), typed.unwrap_or_else(|_| toml::Value::from(*text)));
    }
    let encoder: EncoderConfig = section
        .try_into()
        .map_err(|error: toml::de::Error| format!("{}; write for example {example}", error.message()))?;
    if encoder.model.as_os_str().is_empty() {
        return Err(format!("has no model=FOLDER; `make model` fetches one: write for example {example}"));
    }
    if !encoder.model.is_dir() {
        return Err(format!(
            "model={}: there is no such folder; `make model` fetches all-MiniLM-L6-v2 into .tools/models",
            encoder.model.display()
        ));
    }
    Ok(encoder)
}

/// Takes `,slots=…` and `,timeout=…` off the end, and of an encoder all options; a command may hold commas of its own.
fn split_options(mut rest: &str, all: bool) -> (&str, Vec<(&str, &str)>) {
    let mut options = Vec::new();
    while let Some((before, last)) = rest.rsplit_once(',') {
        match last.split_once('=') {
            Some((key, value)) if all || matches!(key, "slots" | "timeout") => {
                options.push((key, value));
                rest = before;
            }
            _ => break,
        }
    }
    (rest, options)
}

/// Plain words need no shell between us and the handler; anything a shell would read goes to one.
fn command_line(command: &str) -> CommandLine {
    let plain = |c: char| c.is_ascii_alphanumeric() || " \t_-./:=@%+,".contains(c) || !c.is_ascii();
    // `NAME=value command` is a shell's way to set a variable.
    let first_is_word = command.split_whitespace().next().is_some_and(|word| !word.contains('='));
    if command.chars().all(plain) && first_is_word {
        CommandLine::List(command.split_whitespace().map(ToOwned::to_owned).collect())
    } else {
        CommandLine::Shell(command.trim().to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> EndpointConfig {
        EndpointSpec::parse(text).unwrap().0
    }

    fn command(endpoint: &EndpointConfig) -> &CommandLine {
        match endpoint.executor.as_ref().unwrap() {
            ExecutorConfig::Process(process) => &process.command,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn specifications() {
        let tts = read("tts=process:python3 -u my/handler.py,slots=2,timeout=60");
        assert_eq!((tts.name.as_str(), tts.slots(), tts.execution_timeout_ms), ("tts", 2, 60_000));
        assert_eq!(
            *command(&tts),
            CommandLine::List(["python3", "-u", "my/handler.py"].map(Into::into).to_vec())
        );
        let shell = read("x=process:cd \"/a b\" && exec ./run --with a,b=c,timeout=2m");
        assert_eq!(*command(&shell), CommandLine::Shell("cd \"/a b\" && exec ./run --with a,b=c".into()));
        assert_eq!(shell.execution_timeout_ms, 120_000);
        assert_eq!(*command(&read("x=process:A=1 ./run")), CommandLine::Shell("A=1 ./run".into()));
        let embed = read("v=builtin:encoder,model=.,task=rerank,max_seq_len=64,normalize=false,timeout=5");
        match &embed.executor {
            Some(ExecutorConfig::Builtin(Builtin::Encoder(encoder))) => {
                assert_eq!((encoder.max_seq_len, encoder.normalize), (Some(64), Some(false)));
            }
            other => panic!("{other:?}"),
        }
        assert_eq!((embed.slots(), embed.execution_timeout_ms), (256, 5_000));
        let echo = read("e=builtin:echo,slots=3");
        assert!(matches!(echo.executor, Some(ExecutorConfig::Builtin(Builtin::Echo))));
        assert_eq!((echo.slots(), read("s=builtin:sleep").slots()), (3, BUILTIN_SLOTS));
    }

    #[test]
    fn faults_say_what_to_write() {
        for (text, part) in [
            ("echo", "has no NAME="),
            ("a b=builtin:echo", "the name `a b`"),
            ("x=builtin:foo", "no builtin"),
            ("x=builtin:encoder", "has no model=FOLDER"),
            ("x=builtin:encoder,model=/no/such/folder", "`make model`"),
            ("x=builtin:encoder,model=.,task=sing", "unknown variant `sing`"),
            ("x=builtin:encoder,model=.,speed=9", "unknown field `speed`"),
            ("x=process: ", "no command"),
            ("x=http:http://localhost", "not supported"),
            ("x=docker:y", "neither process:"),
            ("x=builtin:echo,slots=many", "slots=many"),
            ("x=builtin:echo,timeout=soon", "timeout: `soon`"),
        ] {
            let error = EndpointSpec::parse(text).unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}
