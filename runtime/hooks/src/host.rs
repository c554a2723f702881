//! Engine, epoch ticker and loading.

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use dsv3_core::Digest;
use wasmtime::{
    Config, Engine,
    component::{Component, Linker, types::ComponentItem},
};

use crate::{Cause, Hook, HookError, Limits, OnError, cache, limits::State};

/// How often the deadline is looked at.
pub(crate) const TICK_MS: u64 = 5;

/// A world of `dsv3:hooks@0.1.0`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum World {
    /// `document-filter`.
    DocumentFilter,
    /// `reward`.
    Reward,
}

impl World {
    /// All worlds.
    pub const ALL: [World; 2] = [World::DocumentFilter, World::Reward];

    /// Name in WIT and in pipelines.
    pub fn name(self) -> &'static str {
        match self {
            Self::DocumentFilter => "document-filter",
            Self::Reward => "reward",
        }
    }

    /// The world called `name`.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|world| world.name() == name)
    }

    /// The exported interface.
    pub(crate) fn interface(self) -> &'static str {
        match self {
            Self::DocumentFilter => "dsv3:hooks/filter@0.1.0",
            Self::Reward => "dsv3:hooks/rewards@0.1.0",
        }
    }

    /// The function that takes a batch.
    pub(crate) fn function(self) -> &'static str {
        match self {
            Self::DocumentFilter => "judge",
            Self::Reward => "score",
        }
    }
}

/// Loads hooks. Keep one per process; it owns the engines and the thread that advances deadlines.
pub struct Host {
    plain: Engine,
    fuelled: Engine,
    cache_dir: Option<PathBuf>,
    ticker: Arc<Ticker>,
}

/// Stops its thread when the host and all hooks are gone.
pub(crate) struct Ticker(Arc<AtomicBool>);

impl Drop for Ticker {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl Host {
    /// A host that keeps compiled code in `cache_dir`, if one is given.
    ///
    /// # Errors
    /// When the machine cannot run WebAssembly or start a thread.
    pub fn new(cache_dir: Option<PathBuf>) -> Result<Self, dsv3_core::Error> {
        let unavailable = |error: &dyn std::fmt::Display| {
            dsv3_core::Error::unavailable(format!("the WASM engine cannot start: {error}"))
        };
        let (plain, fuelled) = engine(false)
            .and_then(|plain| Ok((plain, engine(true)?)))
            .map_err(|error| unavailable(&format!("{error:#}")))?;
        let stop = Arc::new(AtomicBool::new(false));
        let (engines, stopped) = ([plain.clone(), fuelled.clone()], stop.clone());
        std::thread::Builder::new()
            .name("hook-deadlines".into())
            .spawn(move || {
                while !stopped.load(Ordering::Relaxed) {
                    std::thread::sleep(Duration::from_millis(TICK_MS));
                    engines.iter().for_each(Engine::increment_epoch);
                }
            })
            .map_err(|error| unavailable(&error))?;
        Ok(Self { plain, fuelled, cache_dir, ticker: Arc::new(Ticker(stop)) })
    }

    /// Loads a component as `world` and tries its configuration once.
    ///
    /// # Errors
    /// [`Cause::World`] when it is not a component of that world, [`Cause::Configuration`] when it refuses `config`.
    pub fn load(
        &self,
        name: &str,
        wasm: &[u8],
        world: World,
        config: &serde_json::Value,
        limits: Limits,
        on_error: OnError,
    ) -> Result<Hook, HookError> {
        let failed = |reason: String| HookError {
            hook: name.to_owned(),
            batch: None,
            item: None,
            cause: Cause::World { world: world.name(), reason },
        };
        let engine = if limits.fuel.is_some() { &self.fuelled } else { &self.plain };
        let component =
            cache::component(engine, wasm, self.cache_dir.as_deref()).map_err(|error| failed(format!("{error:#}")))?;
        check(engine, &component, world).map_err(failed)?;
        let pre =
            Linker::<State>::new(engine).instantiate_pre(&component).map_err(|error| failed(format!("{error:#}")))?;
        let hook = Hook::new(
            name,
            engine.clone(),
            pre,
            world,
            config,
            limits,
            on_error,
            Digest::of(wasm),
            self.ticker.clone(),
        );
        hook.try_configure()?;
        Ok(hook)
    }

    /// Checks that `wasm` is a component of `world` without running it.
    ///
    /// # Errors
    /// [`Cause::World`] with what is missing or superfluous.
    pub fn check_world(&self, name: &str, wasm: &[u8], world: World) -> Result<(), HookError> {
        cache::component(&self.plain, wasm, self.cache_dir.as_deref())
            .map_err(|error| format!("{error:#}"))
            .and_then(|component| check(&self.plain, &component, world))
            .map_err(|reason| HookError {
                hook: name.to_owned(),
                batch: None,
                item: None,
                cause: Cause::World { world: world.name(), reason },
            })
    }
}

fn engine(fuel: bool) -> wasmtime::Result<Engine> {
    let mut config = Config::new();
    config.epoch_interruption(true).consume_fuel(fuel).wasm_component_model(true);
    // Results must not depend on the machine: one NaN pattern, no relaxed operations whose result may differ.
    config.cranelift_nan_canonicalization(true).wasm_relaxed_simd(false);
    Engine::new(&config)
}

fn check(engine: &Engine, component: &Component, world: World) -> Result<(), String> {
    let kind = component.component_type();
    let imports: Vec<String> = kind.imports(engine).map(|(name, _)| name.to_owned()).collect();
    if !imports.is_empty() {
        return Err(format!("it imports {}, and hooks get no capabilities", imports.join(", ")));
    }
    let exports: Vec<String> = kind.exports(engine).map(|(name, _)| name.to_owned()).collect();
    match kind.get_export(engine, world.interface()).map(|item| item.ty) {
        Some(ComponentItem::ComponentInstance(interface)) => {
            for function in ["configure", world.function()] {
                if interface.get_export(engine, function).is_none() {
                    return Err(format!("its interface {} lacks the function `{function}`", world.interface()));
                }
            }
            Ok(())
        }
        _ if exports.is_empty() => Err(format!("it exports nothing, {} is expected", world.interface())),
        _ => Err(format!("it exports {}, {} is expected", exports.join(", "), world.interface())),
    }
}
