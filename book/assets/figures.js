// Draws the book's figures (.bk-plot) and volumes (.bk-volumes) from the JSON each of them holds. The libraries lie beside
// this script, and each is loaded when the first figure that needs it comes near the screen: over http and from disk alike.
(() => {
  const vendor = new URL(`${document.documentElement.dataset.content_root}_static/vendor/`, location.href);
  // right ventricle blue, myocardium green, left ventricle red, as in the walls of stacks
  const LABELS = { R: [0, 86, 0, 213], G: [0, 180, 158, 94], B: [0, 233, 115, 0], A: [0, 255, 255, 255], I: [0, 1, 2, 3] };
  const element = (name, properties) => Object.assign(document.createElement(name), properties);
  const libraries = window.bkLibraries ?? {}; // an output in a live notebook brings its own
  const load = (file) => (libraries[file] ??= new Promise((resolve, reject) => {
    const onerror = () => reject(new Error(`${file} is missing: build the book with "python book/build.py"`));
    document.head.append(element("script", { src: new URL(file, vendor), onload: resolve, onerror }));
  }));

  async function drawPlot(box, { data, layout }) {
    await load("plotly.min.js");
    await Plotly.newPlot(box, data, layout, { responsive: true, displaylogo: false });
  }

  async function drawVolumes(box, { volumes }) {
    await load("niivue.umd.js");
    const viewer = new niivue.Niivue({
      backColor: [0, 0, 0, 1], crosshairWidth: 0.5, crosshairColor: [0.34, 0.71, 0.91, 0.6], show3Dcrosshair: false,
      isOrientationTextVisible: false, isColorbar: false, dragAndDropEnabled: false, logLevel: "error", loadingText: "",
      multiplanarShowRender: niivue.SHOW_RENDER.ALWAYS, heroImageFraction: 0.55, heroSliceType: niivue.SLICE_TYPE.RENDER,
      clipPlaneColor: [0, 0, 0, 0],
    });
    const canvas = element("canvas", { title: "Drag the 3D view to turn it; click a slice to move through the volume" });
    const buttons = volumes.map((volume) => element("button", { textContent: volume.title, onclick: () => show(volume) }));
    const bar = element("div", { className: "bk-titles" });
    const stage = element("div", { className: "bk-stage" });
    bar.append(...buttons);
    stage.append(canvas);
    box.replaceChildren(bar, stage);
    await viewer.attachToCanvas(canvas);

    async function show(volume) {
      buttons.forEach((button, i) => button.setAttribute("aria-pressed", volumes[i] === volume));
      const image = await niivue.NVImage.loadFromBase64({ base64: volume.nifti, name: "volume.nii.gz", cal_min: 0, cal_max: 255 });
      const labels = volume.labels && await niivue.NVImage.loadFromBase64({ base64: volume.labels, name: "labels.nii.gz", opacity: 0.4 });
      labels?.setColormapLabel(LABELS);
      viewer.volumes.slice().forEach((old) => viewer.removeVolume(old));
      [image, labels].filter(Boolean).forEach((shown) => viewer.addVolume(shown));
      viewer.setSliceType(viewer.sliceTypeMultiplanar);
    }
    await show(volumes[0]);
    viewer.setRenderAzimuthElevation(200, 35);
    viewer.setClipPlane([0.05, 0, 90]); // cut across the ventricles, so that the 3D view shows their inside
  }

  const draw = { "bk-plot": drawPlot, "bk-volumes": drawVolumes };
  const watcher = new IntersectionObserver((entries) => entries.filter((entry) => entry.isIntersecting).forEach(({ target }) => {
    watcher.unobserve(target);
    draw[target.classList[0]](target, JSON.parse(target.querySelector("script").textContent)).catch((error) => {
      target.append(element("p", { className: "bk-error", textContent: error.message }));
      console.error(error);
    });
  }), { rootMargin: "400px" });
  window.drawFigures = (kind) => document.querySelectorAll(`.${kind}`).forEach((box) => {
    if (!box.dataset.watched) watcher.observe(box);
    box.dataset.watched = "yes";
  });
  if (!window.bkLibraries) Object.keys(draw).forEach(drawFigures); // in the book; in a live notebook, outputs ask for it
})();
