// A browser starts no worker for a page that was opened as a file, and the search of this site runs in one.
// On such a page a hidden frame takes the worker's place.
if (location.protocol === "file:") {
  const inFrame = () => {
    self.postMessage = data => frameElement.dispatchEvent(new MessageEvent("said", { data }));
    // in a worker the next line waits for the scripts; here whoever called has to await them
    self.importScripts = async (...urls) => {
      for (const src of urls)
        await new Promise((done, failed) => {
          const script = Object.assign(document.createElement("script"), { src, onload: done, onerror: failed });
          document.head.append(script);
        });
    };
  };
  window.Worker = class extends EventTarget {
    #frame = Object.assign(document.createElement("iframe"), { hidden: true });
    #ready;

    constructor(url) {
      super();
      this.#frame.addEventListener("said", ({ data }) => this.dispatchEvent(new MessageEvent("message", { data })));
      this.#ready = new Promise(done => this.#frame.addEventListener("load", done, { once: true }));
      this.#frame.srcdoc = `<script>(${inFrame})()<\/script><script src="${url}"><\/script>`;
      document.body.append(this.#frame);
    }

    postMessage(data) {
      this.#ready.then(() => this.#frame.contentWindow.dispatchEvent(new MessageEvent("message", { data })));
    }

    terminate() {
      this.#frame.remove();
    }
  };
}
