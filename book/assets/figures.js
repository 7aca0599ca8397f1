// Draws the book's figures (.bk-plot) and volumes (.bk-volumes) from the JSON each of them holds. The libraries lie beside
// this script, and each is loaded when the first figure that needs it comes near the screen: over http and from disk alike.
(() => {
  const assets = new URL(`${document.documentElement.dataset.content_root}_static/`, location.href);
  const element = (name, properties) => Object.assign(document.createElement(name), properties);
  const lacking = (shown, name) => element("p", {
    className: "bk-lacking",
    textContent: `${shown}, because ${name} could not be fetched when this book was built: build it again with a network connection.`,
  });
  const libraries = window.bkLibraries ?? {}; // an output in a live notebook brings its own
  // right ventricle blue, myocardium green, left ventricle red, as in the walls of stacks
  const LABELS = { R: [0, 86, 0, 213], G: [0, 180, 158, 94], B: [0, 233, 115, 0], A: [0, 255, 255, 255], I: [0, 1, 2, 3] };
  const load = (file) => (libraries[file] ??= new Promise((resolve, reject) => {
    document.head.append(element("script", { src: new URL(file, assets), onload: resolve, onerror: reject }));
  }));
  const content = (box) => JSON.parse(box.querySelector("script").textContent);
  const failed = (box, error) => {
    box.append(element("p", { className: "bk-error", textContent: `This figure can't be drawn here: ${error.message ?? error}` }));
    console.error(error);
  };

  async function drawPlot(box) {
    await load("plotly.min.js");
    const { data, layout } = content(box);
    await Plotly.newPlot(box, data, layout, { responsive: true, displaylogo: false, showSendToCloud: false });
  }

  const views = new Map(); // box -> how its volumes were last looked at
  async function drawVolumes(box) {
    const { volumes } = content(box);
    let { chosen, azimuth, elevation } = views.get(box) ?? { chosen: 0, azimuth: 200, elevation: 35 };
    const viewer = new niivue.Niivue({
      backColor: [0, 0, 0, 1], crosshairWidth: 0.5, crosshairColor: [0.34, 0.71, 0.91, 0.6], show3Dcrosshair: false,
      isOrientationTextVisible: false, isColorbar: false, isRadiologicalConvention: true, dragAndDropEnabled: false, logLevel: "error", loadingText: "",
      multiplanarShowRender: niivue.SHOW_RENDER.ALWAYS, heroImageFraction: 0.55, heroSliceType: niivue.SLICE_TYPE.RENDER,
      clipPlaneColor: [0, 0, 0, 0],
    });
    const canvas = element("canvas", { title: "Drag the 3D view to turn it; click a slice to move through the volume" });
    const buttons = volumes.map(({ title }, i) => element("button", { textContent: title, onclick: () => show(i) }));
    const bar = element("div", { className: "bk-titles" });
    const stage = element("div", { className: "bk-stage" });
    bar.append(...buttons);
    stage.append(canvas);
    box.replaceChildren(bar, stage);
    await viewer.attachToCanvas(canvas);

    async function show(number) {
      chosen = number;
      buttons.forEach((button, i) => button.setAttribute("aria-pressed", i === number));
      const { nifti, labels } = volumes[number];
      const image = await niivue.NVImage.loadFromBase64({ base64: nifti, name: "volume.nii.gz", cal_min: 0, cal_max: 255 });
      const overlay = labels && await niivue.NVImage.loadFromBase64({ base64: labels, name: "labels.nii.gz", opacity: 0.4 });
      overlay?.setColormapLabel(LABELS);
      if (number !== chosen) return; // another one was asked for meanwhile
      viewer.volumes.slice().forEach((old) => viewer.removeVolume(old));
      [image, overlay].filter(Boolean).forEach((shown) => viewer.addVolume(shown));
      viewer.setSliceType(viewer.sliceTypeMultiplanar);
    }
    await show(chosen);
    viewer.setRenderAzimuthElevation(azimuth, elevation);
    viewer.setClipPlane([0.05, 0, 90]); // cut across the ventricles, so that the 3D view shows their inside
    return () => {
      views.set(box, { chosen, azimuth: viewer.scene.renderAzimuth, elevation: viewer.scene.renderElevation });
      viewer.cleanup();
      viewer.gl.getExtension("WEBGL_lose_context").loseContext();
    };
  }

  // A browser draws about 16 volumes at once, then takes the first one's context away. So a volume is drawn only while it's
  // near the screen, one after the other, and its still picture stands there otherwise.
  const near = new Set();
  const drawn = new Map(); // box -> what puts its still picture back
  let turn = Promise.resolve();

  async function settle(box) {
    if (drawn.has(box) && !near.has(box)) {
      drawn.get(box)();
      drawn.delete(box);
    } else if (near.has(box) && !drawn.has(box)) {
      const still = [...box.childNodes];
      try {
        await load("vendor/niivue/niivue.umd.js");
      } catch {
        volumes.unobserve(box);
        box.style.minHeight = 0;
        return box.append(lacking("These volumes are still pictures", "NiiVue"));
      }
      try {
        const free = await drawVolumes(box);
        drawn.set(box, () => {
          free();
          box.style.minHeight = `${box.offsetHeight}px`; // so that what is being read stays where it is
          box.replaceChildren(...still);
        });
      } catch (error) {
        volumes.unobserve(box);
        box.replaceChildren(...still);
        failed(box, error);
      }
    }
  }

  const rootMargin = "400px";
  const volumes = new IntersectionObserver((entries) => entries.forEach(({ target, isIntersecting }) => {
    isIntersecting ? near.add(target) : near.delete(target);
    turn = turn.then(() => settle(target));
  }), { rootMargin });
  const plots = new IntersectionObserver((entries) => entries.filter((entry) => entry.isIntersecting).forEach(({ target }) => {
    plots.unobserve(target);
    drawPlot(target).catch((error) => failed(target, error));
  }), { rootMargin });
  window.drawFigures = (kind) => document.querySelectorAll(kind).forEach((box) => {
    if (!box.dataset.watched) (kind === ".bk-plot" ? plots : volumes).observe(box);
    box.dataset.watched = "yes";
  });
  if (window.bkLibraries) return; // in a live notebook outputs ask for what they hold
  [".bk-plot", ".bk-volumes"].forEach(drawFigures);

  window.addEventListener("load", () => {
    if (document.querySelector(".math") && !window.MathJax?.startup?.promise) {
      document.querySelector("article h1").after(lacking("The equations on this page are shown as TeX", "MathJax"));
    }
  });
})();
