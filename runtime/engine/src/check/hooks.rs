//! Hooks: the component is read, is of the world it claims, and stands on ports of that world.

use std::{collections::BTreeMap, sync::Arc};

use dsv3_core::Error;
use dsv3_hooks::{Cause, Host, World};

use super::{CheckedHook, Checker};
use crate::{
    diagnostics::{Diagnostic, did_you_mean, list},
    spec::{HookSpec, StageSpec, files},
};

/// Largest component read.
const WASM_BYTES_MAX: u64 = 256 << 20;

/// The good hooks by name.
pub(super) fn check(
    checker: &mut Checker<'_>,
    host: &impl Fn() -> Result<Arc<Host>, Error>,
) -> BTreeMap<String, CheckedHook> {
    let written = checker.written;
    let mut hooks = BTreeMap::new();
    for hook in &written.hooks {
        let world = World::from_name(&hook.world.text);
        if world.is_none() {
            let known: Vec<&str> = World::ALL.iter().map(|world| world.name()).collect();
            let problem = Diagnostic::new(hook.world.span, format!("there is no world `{}`", hook.world.text));
            let help = did_you_mean(&hook.world.text, known.iter().copied());
            checker.problems.push(problem.help(help.unwrap_or_else(|| format!("worlds: {}", list(known)))));
        }
        let Some(wasm) = read(checker, hook) else { continue };
        if let Some(world) = world {
            try_load(checker, hook, &wasm, world, host);
        }
        let checked = CheckedHook {
            wasm: Arc::new(wasm),
            world: hook.world.text.clone(),
            config: hook.config.clone(),
            limits: hook.limits,
            on_error: hook.on_error,
        };
        hooks.insert(hook.name.text.clone(), checked);
    }
    hooks
}

/// Loads the hook as a run would, so that a component of another world and a configuration it refuses are found now.
fn try_load(
    checker: &mut Checker<'_>,
    hook: &HookSpec,
    wasm: &[u8],
    world: World,
    host: &impl Fn() -> Result<Arc<Host>, Error>,
) {
    let host = match host() {
        Ok(host) => host,
        Err(error) => return checker.problem(hook.name.span, error.to_string()),
    };
    let loaded = host.load(&hook.name.text, wasm, world, &hook.config, hook.limits.to_host(), hook.on_error);
    if let Err(error) = loaded {
        let span = match error.cause {
            Cause::World { .. } => hook.wasm.span,
            _ => hook.config_span,
        };
        checker.problems.push(Diagnostic::new(span, error.to_string()).help(error.help()));
    }
}

fn read(checker: &mut Checker<'_>, hook: &HookSpec) -> Option<Vec<u8>> {
    let base = checker.reading.base(hook.wasm.origin);
    let path = files::locate(&hook.wasm.text, &base, &checker.reading.current_dir);
    let read = std::fs::metadata(&path).and_then(|metadata| match metadata.len() {
        bytes if bytes > WASM_BYTES_MAX => Err(std::io::Error::other(format!("it has {bytes} bytes"))),
        _ => std::fs::read(&path),
    });
    match read {
        Ok(bytes) => Some(bytes),
        Err(error) => {
            let message = format!("the component {} cannot be read: {error}", path.display());
            checker.problem(hook.wasm.span, message);
            None
        }
    }
}

/// Name of the hook on each hook port of a stage.
pub(super) fn check_ports(checker: &mut Checker<'_>, stage: &StageSpec) -> BTreeMap<String, String> {
    let mut ports = BTreeMap::new();
    let Some(entry) = checker.entry(stage) else { return ports };
    for (port, name) in &stage.hooks {
        let hook = checker.written.hooks.iter().find(|hook| hook.name.text == name.text);
        if hook.is_none() {
            let known = checker.written.hooks.iter().map(|hook| hook.name.text.as_str());
            let problem = Diagnostic::new(name.span, format!("no hook is called `{}`", name.text));
            checker.problems.push(problem.maybe_help(did_you_mean(&name.text, known)));
        }
        let Some(spec) = entry.hooks.iter().find(|spec| spec.name == port.text) else {
            let known = entry.hooks.iter().map(|spec| spec.name);
            let message = format!("stage type `{}` has no hook port `{}`", entry.name, port.text);
            checker.problems.push(Diagnostic::new(port.span, message).maybe_help(did_you_mean(&port.text, known)));
            continue;
        };
        if let Some(hook) = hook
            && hook.world.text != spec.world.name()
        {
            let message = format!(
                "hook port `{}` of {} takes world `{}`, but hook `{}` is of world `{}`",
                port.text,
                checker.cite(&stage.name),
                spec.world.name(),
                name.text,
                hook.world.text
            );
            checker.problems.push(Diagnostic::new(name.span, message).note(hook.world.span, "its world"));
        }
        ports.insert(port.text.clone(), name.text.clone());
    }
    for spec in entry.hooks.iter().filter(|spec| spec.required && !ports.contains_key(spec.name)) {
        let message = format!("stage `{}` lacks its hook `{}`: {}", stage.name.text, spec.name, spec.doc);
        let help = format!("add `hooks: {{ {}: NAME }}` with a hook of world `{}`", spec.name, spec.world.name());
        checker.problems.push(Diagnostic::new(stage.name.span, message).help(help));
    }
    ports
}
